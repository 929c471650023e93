"""Everything that the sync and the async client share; does no I/O.

Images become requests, responses become predictions, gRPC's errors become
ours. The clients themselves only open channels and make calls.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from client._errors import (
    DeadlineExceededError,
    InvalidImageError,
    MnistGrpcError,
    OverloadedError,
    ServerError,
    UnauthenticatedError,
    UnavailableError,
)
from client._types import Image, Model, Prediction
from digits.preprocessing import PIXELS, InvalidImage, to_pixels
from protos.mnist.v1 import digit_classifier_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["DigitClassifier"].full_name

TARGET_VARIABLE = "MNIST_GRPC_TARGET"
DEFAULT_TARGET = "localhost:50051"
DEFAULT_TIMEOUT = 10.0  # seconds
DEFAULT_READY_TIMEOUT = 30.0  # seconds
CHUNK_IMAGES = 1024  # of classify_batch: 0.8 MB a message, well below the server's 4 MiB
CHUNKS_IN_FLIGHT = 4
STREAM_WINDOW = 256  # frames whose results were not yet taken
PACKED_FRAMES = 64  # in one message of a stream

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"

READY_PAUSE = 0.05  # seconds before asking a server again that closed the connection
WORTH_WAITING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

StreamResult = Prediction | MnistGrpcError


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """The last thing that comes of a stream: what to raise, if anything."""

    error: Exception | None = None


def resolve_target(target: str | None) -> str:
    """The target given, else that of the environment, else localhost:50051."""
    return target or os.environ.get(TARGET_VARIABLE) or DEFAULT_TARGET


def channel_options(target: str) -> list[tuple[str, str | int]]:
    """Retries, balancing and keepalive are the channel's work, not a loop of ours."""
    retry = {
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
    }
    config = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{"service": SERVICE, "method": "Classify"}, {"service": SERVICE, "method": "GetModel"}],
                "retryPolicy": retry,
            }
        ],
    }
    options: list[tuple[str, str | int]] = [
        ("grpc.service_config", json.dumps(config)),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.max_receive_message_length", -1),
    ]
    if target.startswith(("localhost", "127.", "[::1]", "unix:")):
        options.append(("grpc.enable_http_proxy", 0))  # a proxy cannot reach this machine's own addresses
    return options


# Requests -------------------------------------------------------------------


def prepare(image: Image, index: int | None = None) -> npt.NDArray[np.uint8]:
    """Return the canonical pixels, `uint8[784]`, of one image.

    Raises:
        InvalidImageError: the image cannot be read or breaks a rule.
    """
    try:
        return to_pixels(image).reshape(PIXELS)
    except InvalidImage as error:
        raised = InvalidImageError(str(error) if index is None else f"image {index}: {error}")
        raised.index = index
        raise raised from error


def is_quick(image: Image) -> bool:
    """Whether preparing an image takes too little to leave the event loop for it."""
    return isinstance(image, np.ndarray) and image.size <= 4 * PIXELS


def build_request(pixels: npt.NDArray[np.uint8]) -> pb.ClassifyRequest:
    """A request for pixels `uint8[784]` or `uint8[n, 784]`."""
    return pb.ClassifyRequest(pixels=pixels.tobytes())


def build_requests(images: Iterable[Image]) -> Iterator[pb.ClassifyRequest]:
    """Requests for any number of images, `CHUNK_IMAGES` at a time."""
    numbered = enumerate(images)
    while chunk := [prepare(image, index) for index, image in itertools.islice(numbered, CHUNK_IMAGES)]:
        yield build_request(np.stack(chunk))


def health_request() -> bytes:
    """A grpc.health.v1.HealthCheckRequest for our service.

    By hand, because the message has one field, and the package that brings its
    code would tie the SDK to a narrow range of protobuf versions.
    """
    return b"\x0a" + bytes([len(SERVICE)]) + SERVICE.encode()


def is_serving(health_response: bytes) -> bool:
    """Whether a grpc.health.v1.HealthCheckResponse says SERVING."""
    return health_response == b"\x08\x01"


# Responses ------------------------------------------------------------------


def parse_response(response: pb.ClassifyResponse) -> list[Prediction]:
    """Predictions in the order of the request's images."""
    digits = list(response.digits)
    probabilities = np.array(response.probabilities, np.float32).reshape(-1, 10)
    probabilities.flags.writeable = False
    receipt = response.receipt
    queue_seconds = receipt.queue_time.ToNanoseconds() / 1e9
    compute_seconds = receipt.compute_time.ToNanoseconds() / 1e9
    confidences = probabilities[np.arange(len(digits)), digits].tolist()
    return [
        Prediction(digit, confidence, row, receipt.model_version, receipt.batch_rows, queue_seconds, compute_seconds)
        for digit, confidence, row in zip(digits, confidences, probabilities, strict=True)
    ]


def parse_model(response: pb.GetModelResponse) -> Model:
    return Model(
        name=response.name,
        version=response.version,
        architecture=response.architecture,
        weights_sha256=response.weights_sha256,
        parameter_count=response.parameter_count,
        labels=tuple(response.labels),
        test_accuracy=response.test_accuracy if response.HasField("test_accuracy") else None,
        dataset=response.dataset,
        server_version=response.server_version,
        max_batch_size=response.max_batch_size,
        max_message_bytes=response.max_message_bytes,
    )


class FrameLedger:
    """The frames of one stream that are on their way, and what comes of them in order.

    Frames that wait to be sent go together in one message. A frame that cannot
    be prepared is never sent; its error takes its place among the answers.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._waiting: deque[npt.NDArray[np.uint8]] = deque()
        self._added = 0
        self._answered = 0
        self._local: deque[tuple[int, MnistGrpcError]] = deque()  # behind how many added frames, and the error
        self._progressed_at = time.monotonic()  # a frame was added with none under way, or answered

    def seconds_left(self, timeout: float) -> float:
        """How much longer to wait, where an answer may be owed for `timeout` seconds."""
        return timeout if self._added == self._answered else self._progressed_at + timeout - time.monotonic()

    def add(self, pixels: npt.NDArray[np.uint8]) -> None:
        """Take the next frame, `uint8[784]`."""
        if self._added == self._answered:
            self._progressed_at = time.monotonic()
        self._waiting.append(pixels)
        self._added += 1

    def fail(self, error: MnistGrpcError) -> list[StreamResult]:
        """Put an error in the place of the next frame; return what can be given out now."""
        self._local.append((self._added, error))
        return self._due()

    def next_message(self) -> pb.StreamClassifyRequest | None:
        """A message with the frames that wait, up to `PACKED_FRAMES`; None if none does."""
        if not self._waiting:
            return None
        first = self._added - len(self._waiting)
        packed = [self._waiting.popleft() for _ in range(min(len(self._waiting), PACKED_FRAMES))]
        return pb.StreamClassifyRequest(first_sequence=first, frames=build_request(np.stack(packed)))

    def receive(self, response: pb.StreamClassifyResponse) -> list[StreamResult]:
        """What can be given out now, in the order of the frames."""
        self._progressed_at = time.monotonic()
        results = []
        for block in response.blocks:
            if block.first_sequence != self._answered or block.frame_count > self._added - self._answered:
                raise ServerError(
                    f"{self._target} answered {block.frame_count} frames from {block.first_sequence} on "
                    f"when frames {self._answered} to {self._added - 1} were under way"
                )
            if block.WhichOneof("outcome") == "result":
                outcome: list[StreamResult] = list(parse_response(block.result))
            else:
                outcome = [_error_of_frame(block.error)] * block.frame_count
            for result in outcome:
                self._answered += 1
                results += [result, *self._due()]
        return results

    def _due(self) -> list[StreamResult]:
        due: list[StreamResult] = []
        while self._local and self._local[0][0] <= self._answered:
            due.append(self._local.popleft()[1])
        return due


# Errors ---------------------------------------------------------------------

_ERRORS: dict[grpc.StatusCode, type[MnistGrpcError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidImageError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: UnauthenticatedError,
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}


@contextmanager
def translate_errors(target: str, timeout: float | None) -> Iterator[None]:
    """Raise gRPC's errors as ours; used by both clients."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_of_call(error, target, timeout) from error


def error_of_call(error: grpc.RpcError, target: str, timeout: float | None) -> MnistGrpcError:
    """The error of ours that stands for one of gRPC's, which is its cause."""
    code: grpc.StatusCode = error.code()
    details = error.details() or "no details"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and timeout is not None:
        details = f"no answer within {timeout:g} s"
    elif code is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
        details = f"no server answers there; is it running? ({details})"
    raised = _error(code, details, f"{target}: {details}")
    metadata: Any = error.trailing_metadata() or ()  # pairs, though the sync and the async type differ
    raised.incident_id = dict(metadata).get("incident-id")
    raised.__cause__ = error
    return raised


def _error_of_frame(error: pb.FrameError) -> MnistGrpcError:
    raised = _error(_CODES.get(error.code, grpc.StatusCode.UNKNOWN), error.message, error.message)
    raised.incident_id = error.incident_id or None
    return raised


def _error(code: grpc.StatusCode, details: str, message: str) -> MnistGrpcError:
    kind = _ERRORS.get(code, ServerError)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        kind = InvalidImageError  # gRPC's own refusal of a long message, which no retry mends
    raised = kind(message)
    raised.code = code.name
    return raised


def stream_timed_out(target: str, timeout: float) -> DeadlineExceededError:
    return DeadlineExceededError(f"{target}: no answer to a frame within {timeout:g} s")


def not_ready(target: str, timeout: float) -> UnavailableError:
    return UnavailableError(f"{target}: not serving within {timeout:g} s")


CLOSED = "the client is closed; make a new one"
