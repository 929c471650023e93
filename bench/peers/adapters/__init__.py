"""One file for each system: what starts it, and how it is spoken to."""

from bench.peers.adapters import fastapi, triton
from bench.peers.adapters.ours import OURS
from bench.peers.peer import Peer

PEERS: dict[str, Peer] = {peer.environment or peer.name: peer for peer in (fastapi.PEER, triton.PEER)}

__all__ = ["OURS", "PEERS"]
