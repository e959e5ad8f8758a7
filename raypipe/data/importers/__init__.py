"""Images from outside into a store's data set, at the store: nothing here speaks to anybody.

found     what a source yields: an image's file and what is known of it, or why it cannot be used
safe      files inside the folder and no others; XML without entities; JSON and CSV read piece by piece
picture   what an image file is, before it is taken
sources   image folders, YOLO, COCO, Pascal VOC, CSV; by name
ingest    candidates into Parquet, what is new only, with a report of all that was left out
"""
