"""The adapter: LoRA and the task head."""
