"""Aggregation: one file a rule."""
