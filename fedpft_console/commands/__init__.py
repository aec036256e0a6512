"""The commands of `fedpft`, one file each: its arguments and what it does."""
