"""The task head in closed form, from sums over rows that never leave their owners."""
