"""Concurrent `classify` calls that go together in one message; does no I/O and takes no locks.

The rule is the server's (`server/batching.py`): work-conserving, without a
clock. A call that finds nobody else about is sent at once and by itself. While
others are on their way, callers gather, and go together the moment there is
room. What the server does beyond that, fairness between callers and a queue
that refuses, has no counterpart here, and so the code is not shared.

A few lone calls may be on their way at once, or two callers would wait for each
other in turn. Where callers gather, two messages take turns: one is answered
while the other fills.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

MAX_LONE = 4
"""So many calls are on their way over each connection, each by itself, before the next ones gather."""

MAX_GATHERED = 2
"""So many messages are on their way where one of them carries several calls, or one for each connection."""

MAX_IMAGES = 256
"""In one message: more make an image hardly cheaper, and all their answers later."""

TRIES_LONGER = 200
"""After so many messages a longer one is tried again, where one was too long."""

PATIENCE_SECONDS = 0.05
"""So long a call waits for others to be answered. Then it goes without: they may be with a server that hangs."""


FEW_CALLS = 8
"""Messages that carry fewer are not worth waiting for."""

ENOUGH_CALLS = 32
"""So many calls are worth no more waiting."""

QUIET_SECONDS = 0.001
"""After so long without a new call, none is on its way."""


class Member:
    """One call that gathers: an image, and until when its caller waits."""

    __slots__ = ("deadline", "left", "pixels", "sent", "since", "timeout")

    def __init__(self, pixels: bytes, timeout: float, now: float) -> None:
        self.pixels = pixels  # 784 bytes
        self.timeout = timeout
        self.since = now
        self.deadline = now + timeout
        self.sent = False
        self.left = False  # its caller waits no more


M = TypeVar("M", bound=Member)


class Gathering(Generic[M]):
    """Who waits, and what is on its way.

    What is on its way began with `begin_alone` or `cut`, and ends with `end`.
    """

    def __init__(self, connections: int = 1) -> None:
        self._max_lone = MAX_LONE * connections
        self._max_gathered = max(MAX_GATHERED, connections)
        self._waiting: deque[M] = deque()
        self._lone = 0  # messages on their way that carry one call
        self._gathered = 0  # and those that carry several
        self._max_images = MAX_IMAGES
        self._until_longer = TRIES_LONGER
        self._last = 1  # calls in the last message
        self.joined = 0
        """How many calls have waited so far."""

    @property
    def in_company(self) -> bool:
        """Whether the last message carried several calls: those who called then are about to call again."""
        return self._last > 1

    @property
    def is_complete(self) -> bool:
        """Whether as many wait as went together in the last message, if those were not just a few."""
        return self._last < FEW_CALLS or len(self._waiting) >= min(self._last, ENOUGH_CALLS)

    def begin_alone(self) -> bool:
        """Whether a call that comes now is sent by itself; if so, it is on its way."""
        if self._waiting or self.in_company or not self._room:
            return False
        self._lone += 1
        return True

    def join(self, member: M) -> None:
        """Wait for the next message."""
        self._waiting.append(member)
        self.joined += 1

    @property
    def ready(self) -> bool:
        """Whether a message can be sent."""
        return bool(self._waiting) and self._room

    @property
    def _room(self) -> bool:
        if self._max_images == 1:  # nothing is gained by waiting
            return True
        return self._gathered + self._lone < (self._max_gathered if self._gathered else self._max_lone)

    @property
    def first(self) -> M | None:
        """Who has waited longest, of those who still do."""
        while self._waiting and self._waiting[0].left:
            self._waiting.popleft()
        return self._waiting[0] if self._waiting else None

    def cut(self) -> list[M]:
        """Take those who wait, without those who left; they are on their way, unless nobody is left."""
        # Of many, half go first: while the server computes one half, this side sees to the other.
        alone = self._gathered == 0 and len(self._waiting) >= 2 * FEW_CALLS
        most = min(self._max_images, (len(self._waiting) + 1) // 2 if alone else len(self._waiting))
        members: list[M] = []
        while self._waiting and len(members) < most:
            member = self._waiting.popleft()
            if not member.left:
                member.sent = True
                members.append(member)
        if members:
            self._count(len(members), 1)
            self._last = len(members)
        return members

    def end(self, images: int) -> None:
        """A message of so many images is answered, or never will be."""
        self._count(images, -1)
        if self._max_images < MAX_IMAGES:  # another server, or one with more room, may be there by now
            self._until_longer -= 1
            if not self._until_longer:
                self._max_images = min(2 * self._max_images, MAX_IMAGES)
                self._until_longer = TRIES_LONGER

    def put_back(self, members: list[M]) -> None:
        """Let these wait again, before all others: their message was not sent, or not taken."""
        for member in members:
            member.sent = False
        self._waiting.extendleft(reversed(members))

    def too_long(self, images: int) -> None:
        """A message of so many images was too long for the server."""
        self._max_images = max(1, min(self._max_images, images // 2))
        self._until_longer = TRIES_LONGER

    def drain(self) -> list[M]:
        """Take all who wait: nothing is sent any more."""
        waiting = list(self._waiting)
        self._waiting.clear()
        return waiting

    def _count(self, images: int, messages: int) -> None:
        if images > 1:
            self._gathered += messages
        else:
            self._lone += messages
