"""A process that stays between messages, so that a message costs a node little beyond training.

Flower starts a new process for every message. This one (`ask`) only hands the message to a worker
(`worker`) over a Unix socket, which has the libraries, the model and the encoded rows in memory.
Nothing depends on the worker: where there is none, where it is at work on something else or dies,
the process that Flower started does the work itself.
"""
