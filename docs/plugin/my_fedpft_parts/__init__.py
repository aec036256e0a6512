"""Parts of my own for fedpft, one of each kind."""
