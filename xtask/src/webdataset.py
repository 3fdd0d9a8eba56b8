"""Reads a shard with the Python library webdataset, and prints its keys and classes.

Usage: webdataset.py TAR. One line a sample: key, class index, bytes of the image.
"""

import sys

import webdataset


for sample in webdataset.WebDataset(sys.argv[1], shardshuffle=False):
    print(sample["__key__"], int(sample["cls"]), len(sample["jpg"]))
