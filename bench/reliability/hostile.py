"""Hostile input: bytes that are no messages, messages that are no requests, files that are no images, broken frames.

Knows what to send, not how; everything comes from a random generator that is
handed in, so that a seed repeats it.
"""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from bench.reliability.common import Known
from digits.preprocessing import PIXELS, SIDE
from protos.inference import grpc_inference_service_pb2 as oip
from protos.mnist.v1 import digit_classifier_pb2 as pb

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")
FORGED = "forged: a line that the server did not write"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Hostile:
    """Makes hostile input from valid input."""

    def __init__(self, known: Known, random_: random.Random) -> None:
        self._random = random_
        self._files = _image_files(known)
        pixels = known.pixels.tobytes()
        features = np.linspace(-1, 1, PIXELS, dtype="<f4").tobytes()
        requests = [
            pb.ClassifyRequest(pixels=pixels[:PIXELS]),
            pb.ClassifyRequest(pixels=pixels[: 3 * PIXELS], include_logits=True),
            pb.ClassifyRequest(features=features),
            pb.ClassifyRequest(encoded=pb.EncodedImages(files=self._files[:2])),
        ]
        self._requests = [request.SerializeToString() for request in requests]
        self._requests += [
            pb.StreamClassifyRequest(first_sequence=7, frames=request).SerializeToString() for request in requests
        ]

        rows = 2
        tensors = [
            oip.ModelInferRequest.InferInputTensor(name="pixels", datatype="UINT8", shape=[rows, PIXELS]),
            oip.ModelInferRequest.InferInputTensor(name="features", datatype="FP32", shape=[rows, 1, SIDE, SIDE]),
        ]
        contents = [pixels[: rows * PIXELS], rows * features]
        self._inferences = [
            oip.ModelInferRequest(
                model_name="mnist",
                inputs=[tensor],
                outputs=[oip.ModelInferRequest.InferRequestedOutputTensor(name="digit")],
                raw_input_contents=[content],
            ).SerializeToString()
            for tensor, content in zip(tensors, contents, strict=True)
        ]

    def noise(self) -> bytes:
        """Random bytes, mostly few."""
        return self._random.randbytes(self._random.choice([0, 1, 2, 5, 20, 100, 784, 785, 5_000]))

    def mutated(self, content: bytes) -> bytes:
        """A few bytes changed, dropped, doubled, moved or cut off."""
        random_ = self._random
        changed = bytearray(content)
        for _ in range(random_.choice([1, 1, 2, 5, 20])):
            if not changed:
                break
            at = random_.randrange(len(changed))
            length = random_.choice([1, 2, 4, 16, 64])
            match random_.randrange(7):
                case 0:
                    changed[at] ^= 1 << random_.randrange(8)
                case 1:
                    changed[at : at + length] = random_.randbytes(length)
                case 2:
                    del changed[at : at + length]
                case 3:
                    changed[at:at] = changed[at : at + length]
                case 4:
                    del changed[at:]
                case 5:
                    changed[at : at + length] = random_.choice([b"\x00", b"\xff", b"\x7f"]) * length
                case 6:  # early bytes hold lengths, sizes and tags
                    at = random_.randrange(min(len(changed), 40))
                    changed[at] = random_.randrange(256)
        return bytes(changed)

    def message(self) -> bytes:
        """A damaged request, or one for the other method."""
        content = self._random.choice(self._requests)
        return content if self._random.random() < 0.05 else self.mutated(content)

    def inference(self) -> bytes:
        """A damaged request of the Open Inference Protocol, mostly in its head, where shapes and names are."""
        content = self._random.choice(self._inferences)
        head = self._random.randrange(20, 120)
        return self.mutated(content) if self._random.random() < 0.3 else self.mutated(content[:head]) + content[head:]

    def request(self) -> pb.ClassifyRequest:
        """A sound message with damaged, wrongly sized, or senseless content."""
        random_ = self._random
        match random_.randrange(8):
            case 0:
                return pb.ClassifyRequest(pixels=random_.randbytes(random_.choice([0, 1, 783, 784, 785, 1568, 20_000])))
            case 1:
                return pb.ClassifyRequest(features=random_.randbytes(random_.choice([0, 1, 3135, 3136, 3140, 6272])))
            case 2:
                return pb.ClassifyRequest()
            case 3:
                files = [self.file() for _ in range(random_.choice([0, 2, 5]))]
                return pb.ClassifyRequest(encoded=pb.EncodedImages(files=files))
            case _:
                return pb.ClassifyRequest(encoded=pb.EncodedImages(files=[self.file()]))

    def file(self) -> bytes:
        """A damaged image file, two of them grown together, or noise."""
        random_ = self._random
        if random_.random() < 0.05:
            return self.noise()
        content = random_.choice(self._files)
        if random_.random() < 0.1:
            other = random_.choice(self._files)
            return content[: random_.randrange(len(content))] + other[random_.randrange(len(other)) :]
        return self.mutated(content)

    def wire(self) -> bytes:
        """What no HTTP/2 client would write to a connection."""
        random_ = self._random
        kinds: Sequence[Callable[[], bytes]] = (
            lambda: random_.randbytes(random_.choice([1, 10, 100, 3_000])),
            lambda: b"GET / HTTP/1.1\r\nHost: digits\r\n\r\n",
            lambda: PREFACE[: random_.randrange(len(PREFACE))],
            lambda: PREFACE + random_.randbytes(random_.choice([9, 100, 3_000])),
            lambda: PREFACE + _frame(4, 0, 0, b"") + _frame(7, 0, 0, bytes(7) + b"\x07" + f"\n{FORGED}\n".encode()),
            lambda: PREFACE + self._frames(random_.choice([1, 5, 50])),
            lambda: PREFACE + _frame(4, 0, 0, b"") + self._frames(random_.choice([1, 5, 50])),
            lambda: self.mutated(PREFACE + _frame(4, 0, 0, b"") + self._frames(5)),
        )
        return random_.choice(kinds)()

    def _frames(self, count: int) -> bytes:
        return b"".join(self._frame() for _ in range(count))

    def _frame(self) -> bytes:
        random_ = self._random
        kind = random_.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0xFF])
        stream = random_.choice([0, 0, 1, 1, 3, 5, 2, 0x7FFF_FFFF, 0xFFFF_FFFF])
        payload = random_.randbytes(random_.choice([0, 1, 4, 5, 6, 8, 100, 2_000]))
        length = len(payload) if random_.random() < 0.8 else random_.choice([0, 1, 16_385, 0xFF_FFFF])
        return _frame(kind, random_.randrange(256), stream, payload, length)


def _frame(kind: int, flags: int, stream: int, payload: bytes, length: int | None = None) -> bytes:
    """An HTTP/2 frame (RFC 9113, section 4.1), whose length may be a lie."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _image_files(known: Known) -> list[bytes]:
    """Digits as files of every format and mode, small and larger."""
    files = []
    for row, (side, mode) in enumerate([(SIDE, "L"), (100, "RGB"), (64, "RGBA"), (40, "P"), (33, "1")]):
        picture = Image.fromarray(known.pixels[row].reshape(SIDE, SIDE)).resize((side, side)).convert(mode)
        for format_ in FORMATS:
            if format_ == "JPEG" and mode not in ("L", "RGB"):
                continue
            buffer = io.BytesIO()
            picture.save(buffer, format_)
            files.append(buffer.getvalue())
    return files
