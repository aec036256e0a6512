"""The adapter, LoRA and the task head, and how it plugs into the FM."""
