"""What is sent, and which answer is right: messages of the three methods that read digits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from client.load.images import IMAGES, fixed_digits, images, rows_of
from digits.preprocessing import PIXELS
from protos.inference import grpc_inference_service_pb2 as oip
from protos.mnist.v1 import digit_classifier_pb2 as pb

KINDS = {
    "classify": "/mnist.v1.DigitClassifier/Classify",
    "stream": "/mnist.v1.DigitClassifier/StreamClassify",
    "infer": "/inference.GRPCInferenceService/ModelInfer",
}
"""The method of each kind of load."""

WRONG = "wrong answer"

MESSAGES_BYTES = 64 << 20
"""So much memory the messages may take; large ones are fewer, but two at least."""


class Fault(NamedTuple):
    """Why an answer does not count."""

    what: str
    """`wrong answer`, `lost answer`, or the status: faults are counted by this."""
    detail: str


class Job:
    """Requests of so many images each, of one kind, that go round the bench's images."""

    def __init__(self, kind: str, count: int, digits: Sequence[int] | None) -> None:
        """Digits are what to expect of each of the images; None is for a server that computes nothing."""
        self.path = KINDS[kind]
        self.images = count
        distinct = messages_of(kind, count)
        known = None if digits is None else np.array(digits)
        rows = (rows_of(message, count) for message in range(len(distinct)))
        expected = [fixed_digits(count) if known is None else known[chosen].tolist() for chosen in rows]
        self.messages = [distinct[number % len(distinct)] for number in range(IMAGES)]
        """The i-th of 256, and so on round."""
        self.expected = [expected[number % len(distinct)] for number in range(IMAGES)]
        """What is to be answered to them."""
        self._read = _inferred if kind == "infer" else _classified

    def fault(self, number: int, answer: bytes) -> Fault | None:
        """What is wrong with the answer to the unary call of this number."""
        expected = self.expected[number % IMAGES]
        try:
            digits = self._read(answer)
        except Exception as error:  # protobuf's DecodeError among others
            return Fault(WRONG, f"message {number}: no message that can be read: {error}")
        return None if digits == expected else Fault(WRONG, f"message {number}: {digits} instead of {expected}")


@functools.lru_cache(maxsize=1)
def messages_of(kind: str, count: int) -> list[bytes]:
    """Messages of so many images, all different; kept for the ceiling, which is measured behind the server."""
    make = {"classify": _classify, "stream": _frames, "infer": _infer}[kind]
    pixels = images()
    distinct = min(IMAGES, max(MESSAGES_BYTES // (count * PIXELS), 2))
    return [make(pixels[rows_of(message, count)].tobytes(), count) for message in range(distinct)]


def numbered(sequence: int, frames: bytes) -> bytes:
    """A `StreamClassifyRequest`: the sequence as a varint in field 1 before what `_frames` has made."""
    varint = bytearray()
    while sequence > 127:
        varint.append(sequence & 127 | 128)
        sequence >>= 7
    varint.append(sequence)
    return b"\x08" + bytes(varint) + frames


def _classify(pixels: bytes, count: int) -> bytes:
    return pb.ClassifyRequest(pixels=pixels).SerializeToString()


def _frames(pixels: bytes, count: int) -> bytes:
    return pb.StreamClassifyRequest(frames=pb.ClassifyRequest(pixels=pixels)).SerializeToString()


def _infer(pixels: bytes, count: int) -> bytes:
    tensor = oip.ModelInferRequest.InferInputTensor(name="pixels", datatype="UINT8", shape=[count, PIXELS])
    wanted = oip.ModelInferRequest.InferRequestedOutputTensor(name="digit")
    return oip.ModelInferRequest(
        model_name="mnist", inputs=[tensor], outputs=[wanted], raw_input_contents=[pixels]
    ).SerializeToString()


def _classified(answer: bytes) -> list[int]:
    return list(pb.ClassifyResponse.FromString(answer).digits)


def _inferred(answer: bytes) -> list[int]:
    response = oip.ModelInferResponse.FromString(answer)
    (raw,) = response.raw_output_contents
    digits: list[int] = np.frombuffer(raw, "<i8").tolist()
    return digits
