"""What calls, of gRPC and of plain HTTP, need of the connection over which they came."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from typing import TYPE_CHECKING, Protocol

from server.http2.engine import Engine, Stream

if TYPE_CHECKING:
    from server.http2.server import Http2Server


class Begun(Hashable, Protocol):
    """A call that has begun."""

    stream: Stream
    over: bool

    def feed(self, data: bytes) -> None:
        """Bytes of what the client sends."""

    def feed_end(self) -> None:
        """The client sends no more."""

    def abandon(self) -> None:
        """Nobody waits for the answer any more."""

    def cut_off(self, code: int, message: str) -> None:
        """End the call from outside, with a status of gRPC."""


class Link(Protocol):
    """The connection of a call."""

    server: Http2Server
    engine: Engine
    peer: str

    def flush_soon(self) -> None:
        """Send what is queued in this turn of the event loop, in one go."""

    def answer_sent(self) -> None:
        """A message, a status or the head of an answer was sent."""

    def call_ended(self, call: Begun) -> None:
        """Nothing more is done for it."""

    def sent(self, call: Begun) -> asyncio.Future[None] | None:
        """What to wait for before all of an answer is sent; None if it is."""

    def room_for(self, call: Begun) -> asyncio.Future[None] | None:
        """What to wait for before more is written; None if nothing."""
