"""The proxy that clients get: what it keeps of the FM, building it, packing it."""
