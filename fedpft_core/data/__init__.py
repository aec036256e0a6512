"""Rows, splits, built-in data, own files, partitions, batches and the public corpus.

Importing this package loads numpy at most: pyarrow, torch, datasets and flwr_datasets are imported
inside the functions that need them, because a client process is started per message.
"""
