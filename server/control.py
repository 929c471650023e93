"""Questions and answers between the supervisor and a worker, over one socket and in both directions.

Knows nothing of what is asked. A message is its length, a JSON object, and the
bytes that go with it (of weights, for example) as they are.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

from server.errors import CannotServe

logger = logging.getLogger(__name__)

Fields: TypeAlias = Mapping[str, Any]
"""What JSON can hold."""

Answer: TypeAlias = Callable[[str, Fields, Sequence[bytes]], Awaitable[Fields]]
"""Answers a question with its fields and bytes, or refuses by CannotServe."""

_LENGTH = struct.Struct("!I")  # of the JSON object, in bytes


class LineLost(Exception):
    """The process at the other end is gone."""


class Failed(Exception):
    """The other end met an error of its own; its log has the traceback."""


class Line:
    """One end. Made by `over`; questions of the other end are answered as they come, several at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: Answer) -> None:
        self._reader = reader
        self._writer = writer
        self._answer = answer
        self._asked: dict[int, asyncio.Future[Fields]] = {}
        self._number = 0
        self._answering: set[asyncio.Task[None]] = set()
        self.lost = asyncio.Event()
        """The other end is gone."""
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def over(cls, end: socket.socket, answer: Answer) -> Line:
        """Speak over one end of a socket pair."""
        return cls(*await asyncio.open_unix_connection(sock=end), answer)

    def ask(self, question: str, fields: Fields | None = None, blobs: Sequence[bytes] = ()) -> asyncio.Future[Fields]:
        """Send a question now, after all that were asked before; return what will hold its answer.

        The future raises:
            CannotServe: it was refused.
            Failed: the other end has a fault.
            LineLost: the other end is gone.
        """
        asked: asyncio.Future[Fields] = asyncio.get_running_loop().create_future()
        if self.lost.is_set():
            asked.set_exception(LineLost())
            return asked
        self._number += 1
        self._asked[self._number] = asked
        self._send({"question": question, "number": self._number, "fields": dict(fields or {})}, blobs)
        return asked

    def tell(self, question: str) -> None:
        """Ask without waiting for the answer."""
        self.ask(question).add_done_callback(lambda asked: asked.cancelled() or asked.exception())

    def _send(self, head: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
        encoded = json.dumps(head | {"blobs": [len(blob) for blob in blobs]}).encode()
        self._writer.writelines([_LENGTH.pack(len(encoded)), encoded, *blobs])

    async def _listen(self) -> None:
        try:
            while True:
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                head = json.loads(await self._reader.readexactly(length))
                blobs = [await self._reader.readexactly(size) for size in head["blobs"]]
                if "question" in head:
                    task = asyncio.create_task(self._answer_one(head, blobs))
                    self._answering.add(task)
                    task.add_done_callback(self._answering.discard)
                else:
                    _settle(self._asked.pop(head["number"]), head)
        except (asyncio.IncompleteReadError, OSError):
            pass  # the other end is gone
        finally:
            self.lost.set()
            for asked in self._asked.values():
                if not asked.done():
                    asked.set_exception(LineLost())
            self._writer.close()

    async def _answer_one(self, head: dict[str, Any], blobs: list[bytes]) -> None:
        answer = {"number": head["number"]}
        try:
            answer["fields"] = dict(await self._answer(head["question"], head["fields"], blobs))
        except CannotServe as refusal:
            answer["refusal"] = str(refusal)
        except Exception:
            logger.exception("%r could not be answered", head["question"])
            answer["failure"] = f"{head['question']!r} could not be answered; the log has the reason"
        if not self.lost.is_set():
            self._send(answer)


def _settle(asked: asyncio.Future[Fields], answer: dict[str, Any]) -> None:
    if asked.done():  # who asked has given up
        return
    if "refusal" in answer:
        asked.set_exception(CannotServe(answer["refusal"]))
    elif "failure" in answer:
        asked.set_exception(Failed(answer["failure"]))
    else:
        asked.set_result(answer["fields"])
