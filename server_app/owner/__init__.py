"""What the owner of the FM gives away: the ledger of neurons, disguises, and what is noted."""
