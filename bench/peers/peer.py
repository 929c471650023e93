"""What is said of a serving system: where it is installed, how it is started, how it is spoken to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from server.settings import EMBEDDED_WEIGHTS

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".venv-peers"
SERVERS = Path(__file__).parent / "servers"
"""What the peers run, each with the Python of its environment."""


class CannotStart(Exception):
    """A system is not installed, or does not come to answer."""


@dataclass(frozen=True)
class Place:
    """Where a system is started."""

    python: Path
    """Of its environment."""
    folder: Path
    """Its own, empty at first."""
    ports: tuple[int, ...]
    """Free a moment ago; requests go to the first."""

    @property
    def port(self) -> str:
        """The one for requests."""
        return str(self.ports[0])


@dataclass(frozen=True)
class Command:
    """What starts a system."""

    arguments: list[str]
    variables: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment."""


@dataclass(frozen=True)
class Peer:
    """A serving system."""

    name: str
    dialect: str
    """A key of `bench.peers.dialects.DIALECTS`."""
    start: Callable[[Place], Command]
    settings: str
    """In a few words."""
    environment: str | None = None
    """The folder in `.venv-peers`; None is this Python's."""
    start_seconds: float = 90
    """How long it may take to answer."""

    def python(self) -> Path:
        """Raises CannotStart if the system is not installed."""
        if self.environment is None:
            return Path(sys.executable)
        folder = ENVIRONMENTS / self.environment
        if (folder / "failed").is_file():
            raise CannotStart(f"not installed: {(folder / 'failed').read_text().strip()}")
        if not (folder / "requirement").is_file():
            raise CannotStart(f"not installed: scripts/bench-peers PYTHON {self.environment}")
        return folder / "bin" / "python"


def variables() -> dict[str, str]:
    """What every peer is told: where the weights are, and that torch has one thread a process."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"MNIST_WEIGHTS": str(EMBEDDED_WEIGHTS), **threads}
