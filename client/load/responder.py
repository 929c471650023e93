"""`python -m client.load.responder`: answers what the generator sends with ready answers, as cheaply as Python can.

It sets the generator's ceiling: what is measured at it is what the generator
can do, and no server can seem faster. It understands the generator's frames and
no other client's, and reads nothing of a message but its length.
"""

from __future__ import annotations

import functools
import selectors
import socket
import struct

import numpy as np

from client.load.images import fixed_digits
from client.load.wire import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MOST,
    PREFACE,
    RECEIVE_BYTES,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
    literal,
)
from digits.preprocessing import CLASSES, PIXELS
from protos.inference import grpc_inference_service_pb2 as oip
from protos.mnist.v1 import digit_classifier_pb2 as pb

OK_HEAD = b"\x88" + literal("content-type", "application/grpc")  # :status 200
OK_TAIL = literal("grpc-status", "0")


@functools.cache
def ready_result(count: int) -> pb.ClassifyResponse:
    """An answer of the size and form of a server's."""
    receipt = pb.Receipt(model_version="0" * 12, batch_rows=count)
    receipt.queue_time.FromNanoseconds(100_000)
    receipt.compute_time.FromNanoseconds(100_000)
    return pb.ClassifyResponse(
        digits=fixed_digits(count),
        probabilities=[0.1] * (count * CLASSES),
        digit_scores=[0.0] * count,
        receipt=receipt,
    )


@functools.cache
def ready_answer(kind: str, count: int) -> bytes:
    """Of a unary call."""
    if kind == "classify":
        return ready_result(count).SerializeToString()
    tensor = oip.ModelInferResponse.InferOutputTensor(name="digit", datatype="INT64", shape=[count])
    raw = np.array(fixed_digits(count), "<i8").tobytes()
    return oip.ModelInferResponse(model_name="mnist", outputs=[tensor], raw_output_contents=[raw]).SerializeToString()


class Responder:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        self.socket = connection
        self._received = bytearray()
        self._skip = len(PREFACE)
        self._kinds: dict[int, str] = {}
        self._bodies: dict[int, bytearray] = {}
        self._sequences: dict[int, int] = {}
        self._out = bytearray(frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, MOST)))
        self._out += frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1 << 30))
        self._used = 0

    def exchange(self) -> bool:
        """Receive and send what can be without waiting; return whether the connection goes on."""
        try:
            content = self.socket.recv(RECEIVE_BYTES)
            if not content:
                return False
            self._received += content
        except BlockingIOError:
            pass
        except OSError:
            return False
        self._take()
        return self.flush()

    def flush(self) -> bool:
        """Send what can be without waiting; return whether the connection goes on."""
        try:
            del self._out[: self.socket.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    @property
    def wants_to_write(self) -> bool:
        return bool(self._out)

    def answer(self, stream: int, kind: str, message_bytes: int) -> None:
        """Answer one message. For tests to override."""
        count = message_bytes // PIXELS
        if kind == "stream":
            first = self._sequences.get(stream, 0)
            self._sequences[stream] = first + count
            block = pb.FrameBlock(first_sequence=first, frame_count=count, result=ready_result(count))
            body = pb.StreamClassifyResponse(blocks=[block]).SerializeToString()
            head = b"" if first else frame(HEADERS, END_HEADERS, stream, OK_HEAD)
            self.write(head + framed(stream, body))
        else:
            self.write(whole_answer(stream, ready_answer(kind, count)))

    def write(self, frames: bytes) -> None:
        self._out += frames

    def _take(self) -> None:
        received, start = self._received, self._skip
        if len(received) < start:
            return
        while len(received) - start >= 9:
            length, kind = int.from_bytes(received[start : start + 3]), received[start + 3]
            end = start + 9 + length
            if len(received) < end:
                break
            flags, stream = received[start + 4], int.from_bytes(received[start + 5 : start + 9])
            if kind == HEADERS:
                block = bytes(received[start + 9 : end])
                self._kinds[stream] = (
                    "stream" if b"StreamClassify" in block else "infer" if b"Infer" in block else "classify"
                )
                self._bodies[stream] = bytearray()
            elif kind == DATA:
                self._used += length
                self._data(stream, received[start + 9 : end], bool(flags & END_STREAM))
            elif kind == SETTINGS and not flags & ACK:
                self._out += frame(SETTINGS, ACK, 0, b"")
            start = end
        if self._used > 1 << 29:
            self._out += frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", self._used))
            for number in self._sequences:
                self._out += frame(WINDOW_UPDATE, 0, number, struct.pack(">I", self._used))
            self._used = 0
        self._skip = 0
        del received[:start]

    def _data(self, stream: int, content: bytearray, ends: bool) -> None:
        body = self._bodies[stream]
        body += content
        while len(body) >= 5 and len(body) >= (end := 5 + int.from_bytes(body[1:5])):
            del body[:end]
            self.answer(stream, self._kinds[stream], end - 5)
        if ends:
            kind = self._kinds.pop(stream)
            del self._bodies[stream]
            if kind == "stream":
                self._sequences.pop(stream, None)
                self.write(frame(HEADERS, END_HEADERS | END_STREAM, stream, OK_TAIL))


def framed(stream: int, message: bytes) -> bytes:
    """A message in frames of data."""
    content = struct.pack(">BI", 0, len(message)) + message
    return b"".join(frame(DATA, 0, stream, content[start : start + 16_384]) for start in range(0, len(content), 16_384))


def whole_answer(stream: int, message: bytes, tail: bytes = OK_TAIL) -> bytes:
    """Of a unary call: headers, message, status."""
    head = frame(HEADERS, END_HEADERS, stream, OK_HEAD)
    return head + framed(stream, message) + frame(HEADERS, END_HEADERS | END_STREAM, stream, tail)


def serve(responder: type[Responder] = Responder) -> None:
    """Serve on a free port of this machine until the process is ended."""
    with socket.create_server(("127.0.0.1", 0)) as listener, selectors.DefaultSelector() as selector:
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)
        print(f"serving on 127.0.0.1:{listener.getsockname()[1]}", flush=True)
        connections: dict[int, Responder] = {}
        while True:
            blocked = [one for one in connections.values() if one.wants_to_write and not one.flush()]
            wait = 0.001 if any(one.wants_to_write for one in connections.values()) else None
            for one in blocked:
                selector.unregister(one.socket)
                del connections[one.socket.fileno()]
                one.socket.close()
            for key, _ in selector.select(wait):
                if key.fileobj is listener:
                    accepted, _ = listener.accept()
                    connections[accepted.fileno()] = one = responder(accepted)
                    selector.register(accepted, selectors.EVENT_READ)
                    one.flush()
                elif not connections[key.fd].exchange():
                    selector.unregister(key.fileobj)
                    connections.pop(key.fd).socket.close()


if __name__ == "__main__":
    serve()
