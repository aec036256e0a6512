"""The Flower ServerApp: owns the FM, builds the proxy, runs the rounds."""
