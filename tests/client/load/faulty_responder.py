"""`faulty_responder.py FAULT`: the responder, that does something wrong, or nothing at all, with its 20th message."""

from __future__ import annotations

import socket
import struct
import sys
import time

from client.load.responder import OK_TAIL, Responder, framed, ready_answer, ready_result, serve, whole_answer
from client.load.wire import END_HEADERS, END_STREAM, HEADERS, MAX_CONCURRENT_STREAMS, SETTINGS, frame, literal
from protos.mnist.v1 import digit_classifier_pb2 as pb

FREEZE_SECONDS = 1.0
TURN = 20


class Faulty(Responder):
    """Counts messages over all connections."""

    fault = ""
    count = 0

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        if self.fault == "strict":
            self._out[:0] = frame(SETTINGS, 0, 0, struct.pack(">HI", MAX_CONCURRENT_STREAMS, 8))

    def answer(self, stream: int, kind: str, message_bytes: int) -> None:
        Faulty.count += 1
        if Faulty.count != TURN or self.fault == "strict":
            super().answer(stream, kind, message_bytes)
        elif self.fault == "freeze":
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
            self.write(whole_answer(stream, b"\xff" * 9))
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
            assert self.fault == "lost"

    def _next(self, stream: int) -> int:
        first = self._sequences[stream]
        self._sequences[stream] = first + 1
        return first


if __name__ == "__main__":
    Faulty.fault = sys.argv[1]
    serve(Faulty)
