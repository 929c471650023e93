"""The loads that `python -m bench` measures."""

from __future__ import annotations

from dataclasses import dataclass

from client.load.measure import Load


@dataclass(frozen=True)
class Scenario:
    """A closed loop: `in_flight` messages are unanswered at any time."""

    name: str
    images: int
    """In each message."""
    in_flight: int
    kind: str = "classify"
    """As in `client.load.jobs.KINDS`."""

    def load(self, seconds: float, warm_up: float, connections: int = 0) -> Load:
        """What the generator is to do."""
        return Load(self.kind, self.images, self.in_flight, connections=connections, seconds=seconds, warm_up=warm_up)


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("unary @1", images=1, in_flight=1),
        Scenario("unary @64", images=1, in_flight=64),
        Scenario("256 images @4", images=256, in_flight=4),
        Scenario("stream 1x64", images=1, in_flight=64, kind="stream"),
        Scenario("stream 64x8", images=64, in_flight=8, kind="stream"),
    )
}
