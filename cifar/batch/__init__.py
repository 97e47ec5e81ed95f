"""Batch prediction: images go in, files of predictions come out, each row once, whatever is killed on the way."""
