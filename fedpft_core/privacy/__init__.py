"""Differential privacy: noise, clipping, and what both come to as a number."""
