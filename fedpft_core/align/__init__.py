"""Bringing the proxy nearer to the FM, before and between rounds."""
