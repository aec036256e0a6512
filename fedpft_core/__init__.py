"""FedPFT: federated fine-tuning of a foundation model through a compressed proxy.

The method lives here and runs without Flower; only `wire` imports it.
"""

__version__ = "0.1.0"
