"""`faulty_responder.py FAULT`: the responder, that does something wrong, or nothing at all, with its 20th message."""

from __future__ import annotations

import socket
import struct
import sys
import time

from client.load.responder import OK_HEAD, OK_TAIL, Responder, framed, ready_answer, ready_result, serve, whole_answer
from client.load.wire import (
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    MAX_CONCURRENT_STREAMS,
    SETTINGS,
    frame,
    literal,
)
from protos.mnist.v1 import digit_classifier_pb2 as pb

FREEZE_SECONDS = 1.0
TURN = 20
AT_A_TIME = {"strict": 8, "freeze, one at a time": 1}
"""How many calls a connection may have."""

FORMS = {
    "HTTP 503": (b"\x08\x03503", b"", 1),
    "compressed": (OK_HEAD, b"\1\0\0\0\x51", 1),
    "too short": (OK_HEAD, b"\0\0\0\x10\0", 1),
    "two messages": (OK_HEAD, b"", 2),
}
"""Right answers in a wrong form: the first headers, gRPC's five bytes, how many messages."""


def at_a_time(most: int) -> bytes:
    return frame(SETTINGS, 0, 0, struct.pack(">HI", MAX_CONCURRENT_STREAMS, most))


class Faulty(Responder):
    """Counts messages over all connections."""

    fault = ""
    count = 0

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        if (most := AT_A_TIME.get(self.fault)) is not None:
            self._out[:0] = at_a_time(most)

    def answer(self, stream: int, kind: str, message_bytes: int) -> None:
        Faulty.count += 1
        if Faulty.count != TURN or self.fault in ("strict", "closes at the end"):
            super().answer(stream, kind, message_bytes)
        elif self.fault.startswith("freeze"):
            time.sleep(FREEZE_SECONDS)
            super().answer(stream, kind, message_bytes)
        elif self.fault == "wrong":
            result = pb.ClassifyResponse()
            result.CopyFrom(ready_result(1))
            result.digits[0] += 1
            if kind == "stream":
                block = pb.FrameBlock(first_sequence=self._next(stream), frame_count=1, result=result)
                self.write(framed(stream, pb.StreamClassifyResponse(blocks=[block]).SerializeToString()))
            else:
                self.write(whole_answer(stream, result.SerializeToString()))
        elif self.fault == "another's":
            self.write(whole_answer(stream, ready_answer(kind, 2)))
        elif self.fault == "garbage":
            self.write(framed(stream, b"\xff" * 9) if kind == "stream" else whole_answer(stream, b"\xff" * 9))
        elif self.fault == "unreadable headers":
            self.write(frame(HEADERS, END_HEADERS | END_STREAM, stream, b"\xff" * 6))
        elif self.fault in FORMS:
            head, prefix, times = FORMS[self.fault]
            message = ready_answer(kind, 1)
            content = (prefix or struct.pack(">BI", 0, len(message))) + message
            body = frame(DATA, 0, stream, content) * times
            self.write(frame(HEADERS, END_HEADERS, stream, head) + body)
            self.write(frame(HEADERS, END_HEADERS | END_STREAM, stream, OK_TAIL))
        elif self.fault == "no trailers":
            content = struct.pack(">BI", 0, len(ready_answer(kind, 1))) + ready_answer(kind, 1)
            self.write(
                frame(HEADERS, END_HEADERS, stream, OK_HEAD + OK_TAIL) + frame(DATA, END_STREAM, stream, content)
            )
        elif self.fault == "short goodbye":
            self.write(frame(GOAWAY, 0, 0, b"bye"))
        elif self.fault == "odd settings":
            self.write(frame(SETTINGS, 0, 0, b"odd"))
        elif self.fault == "goodbye with the answer":
            super().answer(stream, kind, message_bytes)
            self.write(frame(GOAWAY, 0, 0, struct.pack(">II", stream, 0) + b"too old"))
        elif self.fault == "fewer":
            self.write(at_a_time(1))
            super().answer(stream, kind, message_bytes)
        elif self.fault == "early end":
            super().answer(stream, kind, message_bytes)
            self.write(frame(HEADERS, END_HEADERS | END_STREAM, stream, OK_TAIL))
        elif self.fault == "refused":
            tail = literal("grpc-status", "8") + literal("grpc-message", "the queue is full")
            self.write(frame(HEADERS, END_HEADERS | END_STREAM, stream, b"\x88" + tail))
        elif self.fault == "no status":
            self.write(whole_answer(stream, ready_answer(kind, 1), tail=literal("x", "y")))
        elif self.fault == "no message":
            self.write(frame(HEADERS, END_HEADERS | END_STREAM, stream, b"\x88" + OK_TAIL))
        elif self.fault == "reset":
            self.write(frame(3, 0, stream, (2).to_bytes(4)))
        elif self.fault == "not begun":
            self.write(frame(3, 0, stream, (7).to_bytes(4)))
        elif self.fault == "goodbye":
            self.write(frame(7, 0, 0, bytes(8) + b"too old"))
        elif self.fault == "bad frame":
            error = pb.FrameError(code=8, message="the queue is full")
            block = pb.FrameBlock(first_sequence=self._next(stream), frame_count=1, error=error)
            self.write(framed(stream, pb.StreamClassifyResponse(blocks=[block]).SerializeToString()))
        elif self.fault == "skipped":
            self._next(stream)
        else:
            assert self.fault == "lost", self.fault

    def _data(self, stream: int, content: bytearray, ends: bool) -> None:
        if self.fault == "closes at the end" and ends:
            self.socket.shutdown(socket.SHUT_RDWR)
        else:
            super()._data(stream, content, ends)

    def _next(self, stream: int) -> int:
        first = self._sequences[stream]
        self._sequences[stream] = first + 1
        return first


if __name__ == "__main__":
    Faulty.fault = sys.argv[1]
    serve(Faulty)
