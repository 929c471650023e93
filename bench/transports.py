"""`python -m bench.transports`: the two transports beside each other, by a client that is neither.

One worker each, one connection, real digits whose answers are checked. Calls
are kept in flight by a plain socket that speaks as much HTTP/2 as that needs,
since Python's gRPC client costs more than the server it would measure. Rounds
take turns, so that what else the machine does falls on both.
"""

from __future__ import annotations

import itertools
import json
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import hpack
import numpy as np
import numpy.typing as npt

from bench.processes import Server, server
from protos.mnist.v1 import digit_classifier_pb2 as pb
from server.golden import golden_digits
from server.settings import TRANSPORTS

ROUNDS = 7
CALLS, LONE_CALLS, FRAMES = 6_000, 1_000, 10_000
IN_FLIGHT = 64

_DATA, _HEADERS, _RESET, _SETTINGS, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_INITIAL_WINDOW = 4
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class WrongAnswer(Exception):
    """The server answered something else than it should have."""


class Caller:
    """One connection."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._socket = socket.create_connection((host, int(port)), timeout=30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._encoder = hpack.Encoder()
        self._numbers = itertools.count(1, 2)
        self._rest = b""
        self._window = self._first_window = 65535  # of a stream that sends
        self._connection_window = 65535
        settings = struct.pack(">HI", _INITIAL_WINDOW, 2**30)
        self._socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, settings))
        self._socket.sendall(_frame(_WINDOW_UPDATE, 0, 0, (2**30).to_bytes(4)))

    def classify(self, pixels: npt.NDArray[np.uint8], labels: list[int], count: int, in_flight: int) -> None:
        """Make so many calls of one image, with so many in flight."""
        messages = [_message(pb.ClassifyRequest(pixels=row.tobytes())) for row in pixels]
        expected: dict[int, int] = {}
        bodies: dict[int, bytes] = {}
        sent = done = 0
        while done < count:
            frames: list[bytes] = []
            while sent < count and len(expected) < in_flight and self._connection_window >= len(messages[0]):
                message = messages[sent % len(messages)]
                number = self._open("Classify", frames)
                frames.append(_frame(_DATA, _END_STREAM, number, message))
                self._connection_window -= len(message)
                expected[number] = labels[sent % len(labels)]
                sent += 1
            self._socket.sendall(b"".join(frames))
            for kind, flags, number, content in self._receive():
                if kind == _DATA:
                    bodies[number] = bodies.get(number, b"") + content
                if flags & _END_STREAM:
                    answer = pb.ClassifyResponse.FromString(bodies.pop(number)[5:])
                    if list(answer.digits) != [expected.pop(number)]:
                        raise WrongAnswer(f"call {number} was answered {answer.digits}")
                    done += 1

    def stream(self, pixels: npt.NDArray[np.uint8], labels: list[int], count: int, in_flight: int) -> None:
        """Send so many frames, one a message, with so many unanswered."""
        opening: list[bytes] = []
        number = self._open("StreamClassify", opening)
        self._socket.sendall(b"".join(opening))
        self._window = self._first_window
        sent = done = 0
        body = b""
        requests = (
            pb.StreamClassifyRequest(
                first_sequence=index, frames=pb.ClassifyRequest(pixels=pixels[index % len(pixels)].tobytes())
            )
            for index in range(count)
        )
        messages = [_message(request) for request in requests]
        while done < count:
            frames: list[bytes] = []
            while sent < count and sent - done < in_flight:
                size = len(messages[sent])
                if min(self._window, self._connection_window) < size:
                    break
                frames.append(_frame(_DATA, 0, number, messages[sent]))
                self._window -= size
                self._connection_window -= size
                sent += 1
            self._socket.sendall(b"".join(frames))
            for kind, _, _, content in self._receive():
                body += content if kind == _DATA else b""
            while len(body) >= 5 and len(body) >= 5 + (length := int.from_bytes(body[1:5])):
                response = pb.StreamClassifyResponse.FromString(body[5 : 5 + length])
                body = body[5 + length :]
                for block in response.blocks:
                    expected = [labels[index % len(labels)] for index in range(done, done + block.frame_count)]
                    if block.first_sequence != done or list(block.result.digits) != expected:
                        raise WrongAnswer(f"frames from {done} on were answered {block}")
                    done += block.frame_count
        self._socket.sendall(_frame(_DATA, _END_STREAM, number, b""))
        while not any(flags & _END_STREAM for kind, flags, _, _ in self._receive() if kind == _HEADERS):
            pass

    def _open(self, method: str, frames: list[bytes]) -> int:
        headers = [
            (":method", "POST"),
            (":path", f"/mnist.v1.DigitClassifier/{method}"),
            (":scheme", "http"),
            (":authority", "bench"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ]
        number = next(self._numbers)
        frames.append(_frame(_HEADERS, _END_HEADERS, number, self._encoder.encode(headers)))
        return number

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        """The frames of calls that come next; settings and windows are kept here."""
        self._rest += self._socket.recv(1 << 18)
        while len(self._rest) >= 9 and len(self._rest) >= 9 + (length := int.from_bytes(self._rest[:3])):
            kind, flags, number = self._rest[3], self._rest[4], int.from_bytes(self._rest[5:9])
            content = self._rest[9 : 9 + length]
            self._rest = self._rest[9 + length :]
            if kind in (_RESET, _GOAWAY):
                raise WrongAnswer(f"the server gave up: frame {kind}, {content!r}")
            if kind == _WINDOW_UPDATE:
                if number:
                    self._window += int.from_bytes(content)
                else:
                    self._connection_window += int.from_bytes(content)
            elif kind == _SETTINGS and not flags & _ACK:
                for name, value in struct.iter_unpack(">HI", content):
                    if name == _INITIAL_WINDOW:
                        self._window += value - self._first_window
                        self._first_window = value
                self._socket.sendall(_frame(_SETTINGS, _ACK, 0, b""))
            elif kind in (_DATA, _HEADERS):
                yield kind, flags, number, content

    def close(self) -> None:
        self._socket.close()


def _message(message: pb.ClassifyRequest | pb.StreamClassifyRequest) -> bytes:
    content = message.SerializeToString()
    return struct.pack(">BI", 0, len(content)) + content


def _frame(kind: int, flags: int, number: int, content: bytes) -> bytes:
    return len(content).to_bytes(3) + bytes([kind, flags]) + number.to_bytes(4) + content


def main() -> None:
    """Print medians over the rounds: a second, processor time of the server, and ratios within each round."""
    pixels, labels = golden_digits()
    known = labels.tolist()
    tasks: dict[str, tuple[int, Callable[[Caller], None]]] = {
        "one call at a time": (LONE_CALLS, lambda caller: caller.classify(pixels, known, LONE_CALLS, 1)),
        f"{IN_FLIGHT} calls in flight": (CALLS, lambda caller: caller.classify(pixels, known, CALLS, IN_FLIGHT)),
        f"one stream, {IN_FLIGHT} frames in flight": (
            FRAMES,
            lambda caller: caller.stream(pixels, known, FRAMES, IN_FLIGHT),
        ),
    }
    figures = {}
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for transport in TRANSPORTS:
            flags = ("--port", "0", "--workers", "1", "--transport", transport, "--log-level", "warning")
            servers[transport] = stack.enter_context(server("server", flags))
        for name, (count, task) in tasks.items():
            rounds = [{transport: _round(servers[transport], task) for transport in TRANSPORTS} for _ in range(ROUNDS)]
            ratios = [times["grpcio"][0] / times["asgi"][0] for times in rounds]
            figures[name] = {
                transport: {
                    "a second": round(count / statistics.median(times[transport][0] for times in rounds)),
                    "processor us each": round(
                        1e6 * statistics.median(times[transport][1] for times in rounds) / count
                    ),
                }
                for transport in TRANSPORTS
            } | {"asgi / grpcio": f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"}
    print(json.dumps(figures, indent=2))


def _round(target: Server, task: Callable[[Caller], None]) -> tuple[float, float]:
    """The seconds that a task took, and those of the server's processor."""
    caller = Caller(target.target)
    try:
        cpu, start = target.cpu_seconds(), time.perf_counter()
        task(caller)
        return time.perf_counter() - start, target.cpu_seconds() - cpu
    finally:
        caller.close()


if __name__ == "__main__":
    main()
