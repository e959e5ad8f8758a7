"""How private data lies on a store's disk, and where the sample data comes from.

dataset   what a trainer sees of a data set; readers by name
files     image files in memory as a data set, for a user's own reader
decode    image bytes to pixels, broken ones masked
schema    the Parquet schema, written and checked
parquet   the reader for it
sample    Fashion-MNIST: the bundled sample, or all 70,000
split     which store gets which image
camera    how a store's camera sees
stores    the private data sets of a local federation
"""
