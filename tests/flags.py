"""Flags of a network and batches small enough for the images of the tests."""

TINY = ["--image-size", "16", "--widths", "8", "16", "--depths", "2", "--batch-size", "44"]
