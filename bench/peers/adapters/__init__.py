"""One file for each system: what starts it, and how it is spoken to."""

from bench.peers.adapters import fastapi, kserve, litserve, mlserver, pytriton, ray, torchserve, triton
from bench.peers.adapters.ours import OURS
from bench.peers.peer import Peer

_ADAPTERS = (fastapi, triton, litserve, mlserver, kserve, pytriton, ray, torchserve)
PEERS: dict[str, Peer] = {adapter.__name__.rpartition(".")[2]: adapter.PEER for adapter in _ADAPTERS}

__all__ = ["OURS", "PEERS"]
