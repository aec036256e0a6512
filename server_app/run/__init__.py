"""The run folder: events, checkpoints, the cache of distilled sub-FMs."""
