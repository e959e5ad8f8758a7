"""Images from outside into a store's data set, at the store: nothing here speaks to anybody.

found     what a source yields: an image's file and what is known of it, or why it cannot be used
safe      files inside the folder and no others; XML without entities; JSON and CSV read piece by piece
exif      how a camera was held, and boxes turned with the image
picture   what an image file is, before it is taken
boxes     a source's boxes as pixels of the image that is seen
sources   the formats by name: image folders and YOLO; coco, voc and table (CSV) have a file each
known     what is in the data set already
ingest    candidates into Parquet, what is new only, with a report of all that was left out
"""
