"""One round: who is there, what is sent, the chain a reply passes, what comes of it."""
