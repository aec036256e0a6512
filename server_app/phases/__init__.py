"""The phases of a run, one file each; every one is a function of the bench."""
