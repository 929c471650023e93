"""The SDK as a load generator: the callers are tasks of one `AsyncClient`, whose calls go together.

They send the golden digits, as in row 6 of docs/performance.md: the SDK searches
images with noise to their edges for the digit, as pictures, and this is no
measure of that. `python -m bench.peers.sdk` takes orders as
`python -m bench.peers.load` does.
"""

from __future__ import annotations

import client
from bench.client import Callers
from bench.client import WrongAnswer as NotTheNetworks
from bench.peers.load import LoadError, Sample, Target, WrongAnswer, obey
from server.golden import golden_digits


class Tasks:
    """Of a server of ours, single images."""

    def __init__(self, digits: list[int]) -> None:
        """Expect these digits of the golden ones."""
        self._digits = digits

    def closed_loop(self, target: Target, images_per_request: int, in_flight: int, seconds: float) -> Sample:
        if images_per_request != 1:
            raise ValueError("a call of the SDK has one image")
        callers = Callers(target.address, [*golden_digits()[0].reshape(-1, 28, 28)], self._digits)
        try:
            return Sample(**callers.measure("tasks", in_flight, seconds, coalesce=True))
        except NotTheNetworks as error:
            raise WrongAnswer(str(error)) from error
        except client.MnistGrpcError as error:
            raise LoadError(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    obey(Tasks)
