"""One file for each system: what starts it, and how it is spoken to."""

from bench.peers.adapters import fastapi, kserve, litserve, mlserver, pytriton, ray, torchserve, triton, triton_cpp
from bench.peers.adapters.ours import OURS
from bench.peers.peer import Peer

_ADAPTERS = (fastapi, triton, triton_cpp, litserve, mlserver, kserve, pytriton, ray, torchserve)
PEERS: dict[str, Peer] = {adapter.__name__.rpartition(".")[2].replace("_", "-"): adapter.PEER for adapter in _ADAPTERS}

__all__ = ["OURS", "PEERS"]
