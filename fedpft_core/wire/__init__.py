"""What crosses the network: messages, their validation and their formats."""
