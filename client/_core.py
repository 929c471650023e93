"""Everything that the sync and the async client share; does no I/O.

Images become requests, responses become predictions, gRPC's errors become
ours. The clients themselves only open channels and make calls.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from client import _request_id
from client._advice import explain, is_refused_for_length, retry_after
from client._channel import SERVICE
from client._errors import (
    DeadlineExceededError,
    InvalidImageError,
    MnistGrpcError,
    OverloadedError,
    OvertakenError,
    ServerError,
    UnauthenticatedError,
    UnavailableError,
)
from client._types import Image, Model, Prediction, PredictionDraft
from digits.canonical import canonical_bytes, may_be_canonical
from digits.preprocessing import DIGITS, PIXELS, InvalidImage, Preprocessing, preprocess
from protos.mnist.v1 import digit_classifier_pb2 as pb

DEFAULT_TIMEOUT = 10.0  # seconds
MAX_TIMEOUT = 1e9  # seconds, 31 years; gRPC's clock overflows somewhere above
DEFAULT_READY_TIMEOUT = 30.0  # seconds
STREAM_WINDOW = 256  # frames whose results were not yet taken
PACKED_FRAMES = 64  # in one message of a stream

_BYTE = np.dtype(np.uint8)

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"

READY_PAUSE = 0.05  # seconds before asking a server again that closed the connection
WORTH_WAITING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def checked_timeout(timeout: float) -> float:
    """The timeout, if it is one.

    Raises:
        ValueError: it is not above 0, or above a billion.
    """
    if not 0 < timeout <= MAX_TIMEOUT:
        raise ValueError(f"a timeout is a number of seconds above 0, {MAX_TIMEOUT:g} at most, not {timeout!r}")
    return timeout


def checked_window(window: int) -> int:
    """The window, if it is one.

    Raises:
        ValueError: it is no whole number, or below 1.
    """
    if not isinstance(window, (int, np.integer)) or isinstance(window, bool) or window < 1:
        raise ValueError(f"a window is a whole number of frames, 1 or more, not {window!r}")
    return int(window)


# Requests -------------------------------------------------------------------


def prepare(image: Image, index: int | None = None) -> npt.NDArray[np.uint8]:
    """Return the canonical pixels, `uint8[784]`, of one image.

    Raises:
        InvalidImageError: the image cannot be read or breaks a rule.
    """
    return stages_of(image, index).pixels.reshape(PIXELS)


def stages_of(image: Image, index: int | None = None) -> Preprocessing:
    """What `prepare` does, with the stages in between. The same errors."""
    try:
        return preprocess(image)
    except InvalidImage as error:
        raised = InvalidImageError(str(error) if index is None else f"image {index}: {error}")
        raised.index = index
        raise raised from error


def prepare_bytes(image: Image) -> bytes:
    """As `prepare`, the pixels as they go into a message."""
    return quick_bytes(image) or prepare(image).tobytes()


def quick_bytes(image: Image) -> bytes | None:
    """The pixels of an array that already is as MNIST's images are, which takes no time; else None."""
    return canonical_bytes(image) if type(image) is np.ndarray and image.dtype == _BYTE else None


def bytes_at_a_glance(image: Image) -> bytes | None:
    """The pixels of an array that may already be as MNIST's images are; None of what is not, or has to be read."""
    return may_be_canonical(image) if type(image) is np.ndarray and image.dtype == _BYTE else None


def is_quick(image: Image) -> bool:
    """Whether preparing an image takes too little to leave the event loop for it."""
    return quick_bytes(image) is not None


def build_request(pixels: npt.NDArray[np.uint8]) -> pb.ClassifyRequest:
    """A request for pixels `uint8[784]` or `uint8[n, 784]`."""
    return pb.ClassifyRequest(pixels=pixels.tobytes())


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


def parse_response(response: pb.ClassifyResponse, count: int, target: str) -> list[Prediction]:
    """Predictions for `count` images, in the order of the request.

    Raises:
        ServerError: this is no answer to that many images.
    """
    digits, labels = list(response.digits), tuple(response.labels) or DIGITS
    classes = len(labels)
    if len(digits) != count or len(response.probabilities) != classes * count or max(digits, default=0) >= classes:
        raise ServerError(
            f"{target}: the server answered {count} images with {len(digits)} digits "
            f"and {len(response.probabilities)} probabilities of {classes} classes"
        )
    scores = list(response.digit_scores)  # none come from older servers
    if len(scores) not in (0, count):
        raise ServerError(f"{target}: the server answered {count} images with {len(scores)} digit scores")
    are_digits: list[bool | None] = [None] * count
    if scores and response.HasField("digit_threshold"):
        threshold = response.digit_threshold
        are_digits = [score >= threshold for score in scores]
    probabilities = np.array(response.probabilities, np.float32).reshape(-1, classes)
    if count and not (probabilities.min() >= 0 and probabilities.max() <= 1 + 1e-3):  # which is so of NaN, too
        raise ServerError(
            f"{target}: the server answered with probabilities from {probabilities.min()} to {probabilities.max()}"
        )
    probabilities.flags.writeable = False
    receipt = response.receipt
    queue_seconds = receipt.queue_time.ToNanoseconds() / 1e9
    compute_seconds = receipt.compute_time.ToNanoseconds() / 1e9
    confidences = probabilities[np.arange(len(digits)), digits].tolist()
    common = receipt.model_version, receipt.batch_rows, queue_seconds, compute_seconds
    scores = scores or [math.nan] * count
    predictions = []
    for digit, confidence, row, score, is_digit in zip(
        digits, confidences, probabilities, scores, are_digits, strict=True
    ):
        prediction = PredictionDraft(digit, confidence, row, *common, score, is_digit, labels)
        prediction.__class__ = Prediction
        predictions.append(prediction)
    return predictions


def parse_model(response: pb.GetModelResponse) -> Model:
    return Model(
        name=response.name,
        version=response.version,
        architecture=response.architecture,
        weights_sha256=response.weights_sha256,
        parameter_count=response.parameter_count,
        labels=tuple(response.labels),
        normalization_mean=response.normalization_mean,
        normalization_std=response.normalization_std,
        temperature=response.temperature,
        test_accuracy=response.test_accuracy if response.HasField("test_accuracy") else None,
        dataset=response.dataset,
        server_version=response.server_version,
        max_batch_size=response.max_batch_size,
        max_message_bytes=response.max_message_bytes,
        digit_threshold=response.digit_threshold if response.HasField("digit_threshold") else None,
    )


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
def translate_errors(target: str, timeout: float) -> Iterator[None]:
    """Raise gRPC's errors as ours; used by both clients."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_of_call(error, target, timeout) from error


def error_of_call(error: grpc.RpcError, target: str, timeout: float) -> MnistGrpcError:
    """The error of ours that stands for one of gRPC's, which is its cause."""
    code: grpc.StatusCode = error.code()
    details = error.details() or "no details"
    metadata: Any = error.trailing_metadata() or ()  # pairs, though the sync and the async type differ
    trailers = dict(tuple(metadata))  # as pairs: with old versions of grpcio, that of asyncio is no mapping to dict
    wait = retry_after(trailers)
    told = explain(code, details, target, timeout, wait)
    incident_id = trailers.get("incident-id")
    if incident_id is not None and incident_id not in told:
        told += f" under incident {incident_id}"
    raised = _error(code, details, f"{target}: {told}")
    raised.incident_id = incident_id
    raised.retry_after = wait
    raised.request_id = trailers.get(_request_id.KEY) or _request_id.given()
    raised.__cause__ = error
    return raised


def error_of_member(error: Exception, target: str, timeout: float) -> Exception:
    """The error of one of several calls whose common message failed: each caller has one of its own.

    What a token's function or an interceptor raised is theirs, and may not be made to be copied: all get the same.
    """
    if not isinstance(error, MnistGrpcError):
        return error
    own = copy.copy(error)
    own.__cause__ = error.__cause__
    if isinstance(own, DeadlineExceededError):
        own.args = no_answer(target, timeout).args  # the caller's own timeout, not what was left of it
    return own


def is_too_long(error: Exception, images: int) -> bool:
    """Whether a message of so many images was refused for its length.

    Nothing else can be wrong with pixels that were made here. A server with a
    short queue or a low message limit takes the same images in several messages.
    """
    return images > 1 and isinstance(error, InvalidImageError)


def no_answer(target: str, timeout: float) -> DeadlineExceededError:
    """The error of a call that waits no longer than its timeout for a message that it shares."""
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    raised = DeadlineExceededError(f"{target}: {explain(code, 'Deadline Exceeded', target, timeout, None)}")
    raised.code = code.name
    return raised


def error_of_frame(error: pb.FrameError) -> MnistGrpcError:
    code = _CODES.get(error.code, grpc.StatusCode.UNKNOWN)
    raised = _error(code, error.message, error.message)
    if code is grpc.StatusCode.ABORTED:
        raised = OvertakenError(error.message)
        raised.code = code.name
    raised.incident_id = error.incident_id or None
    return raised


def _error(code: grpc.StatusCode, details: str, message: str) -> MnistGrpcError:
    kind = _ERRORS.get(code, ServerError)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and is_refused_for_length(details):
        kind = InvalidImageError
    raised = kind(message)
    raised.code = code.name
    return raised


def end_call(call: Any) -> None:
    """Cancel a call, or close the generator that an interceptor gave in place of one.

    A generator is closed by the thread that iterates over it and by no other: of
    two threads that close one at a time, CPython 3.11 may crash.
    """
    end = getattr(call, "cancel", None) or getattr(call, "close", None)
    if end is not None:
        end()


# Readiness ------------------------------------------------------------------


class Waiting:
    """What `wait_ready` does between its calls."""

    def __init__(self, target: str, timeout: float, several_servers: bool) -> None:
        self._target = target
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._longest = 1.0 if several_servers else timeout  # for another may serve meanwhile

    def seconds_of_call(self) -> float:
        """How long the next call may take.

        Raises:
            UnavailableError: the time is over.
        """
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise not_ready(self._target, self._timeout)
        return min(left, self._longest)

    def end_of_call(self, error: grpc.RpcError) -> None:
        """Raise what is no reason to wait."""
        if error.code() not in WORTH_WAITING:
            raise error


def not_ready(target: str, timeout: float) -> UnavailableError:
    return UnavailableError(
        f"{target}: not serving within {timeout:g} s; is it running there? is_serving() tells why not"
    )


CLOSED = "the client is closed; make a new one"
