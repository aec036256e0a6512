"""The Flower ClientApp: a node's rows, its store, and one message at a time."""
