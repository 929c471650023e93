"""Our server and other serving systems side by side, on the same weights, cores and loads.

`scripts/bench-peers` makes an environment for each system, `python -m bench.peers`
starts them and measures; `make bench-peers` does both. docs/peers.md tells how
each is set, and why.
"""
