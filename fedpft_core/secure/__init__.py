"""Secure aggregation: the server learns the sum of the clients' numbers and none of them.

Each client adds masks to its numbers: a quantised change, or sums over rows as whole numbers. Pairs
of neighbours draw one mask each from a secret that both know, and one adds what the other
subtracts; besides, each adds a mask of its own. Neighbours hold shares of these secrets, so that
the server can take off the masks that are left when everybody has answered or gone: the own mask of
one who answered, or the pairs' masks of one who did not, never both. All functions are pure but for
the entropy they draw.

Source: Bonawitz et al. 2017 (CCS) and, for the sparse graph, Bell et al. 2020 (arXiv:2006.10955).
"""
