"""Local fine-tuning, evaluation, inactivity counts and gradients."""
