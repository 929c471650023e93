"""The synchronous client."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self, TypeAlias, cast

import grpc
import PIL.Image

from client import _core, _explain, _fork, _request_id
from client._batch import MESSAGES_IN_FLIGHT, Chunks, _as_array, progress_bar
from client._channel import TLS, ChannelSettings, channel_settings, checked_interceptors
from client._connection import Connection
from client._errors import MnistGrpcError
from client._routing import SyncRouter
from client._sync_batch import exchange, flat
from client._sync_gather import SyncGather
from client._sync_stream import SyncStream
from client._types import Image, Model, Prediction
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1.digit_classifier_pb2_grpc import DigitClassifierStub

Interceptor: TypeAlias = (
    "grpc.UnaryUnaryClientInterceptor | grpc.UnaryStreamClientInterceptor | "
    "grpc.StreamUnaryClientInterceptor | grpc.StreamStreamClientInterceptor"
)
_INTERCEPTORS = (
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
)


class Client(Connection):
    """A connection to a digit server.

    May be shared between threads. A forked process opens a connection of its
    own, or raises RuntimeError if at the fork a call was under way in another
    thread, or an `AsyncClient` had been used. A context manager; otherwise call `close`. The connection is made by
    the first call, and made again when it is lost.

        >>> with client.Client("localhost:50051", timeout=2.5) as digits:
        ...     digits.classify("3.png").digit
        3

    Args:
        target: `host:port`, the port 50051 where it is left out, or any gRPC
            target such as `dns:///digits:50051` or `unix:/run/digits.sock`;
            else the environment variable `MNIST_GRPC_TARGET`, else
            `localhost:50051`. Several, in a sequence or with commas between:
            calls are spread over those that can be reached.
        timeout: seconds that a call may take unless it says otherwise.
        tls: True, or a `client.TLS` where the server's authority is not a
            public one, or where it asks for a certificate.
        token: sent with each call as `authorization: Bearer …`; a function is
            asked at each call, and should not take long. Only with TLS, or to
            this machine.
        metadata: pairs to send with each call.
        interceptors: of gRPC's, for `Client` its synchronous, for
            `AsyncClient` its asynchronous ones.
        connections: TCP connections to each server. A server with several
            workers, or a balancer in front of several, spreads connections and
            not calls: take more than there are workers.
        wait_for_ready: calls wait for the server, within their timeout, in
            place of failing when it cannot be reached.
        coalesce: `classify` calls that are made while others are on their way
            go together in one message, which is many times cheaper. A lone
            call waits for nobody, and calls with a `request_id` of their own
            go by themselves.

    Every call raises a subclass of `MnistGrpcError`: `InvalidImageError`,
    `DeadlineExceededError`, `OverloadedError`, `UnavailableError`,
    `UnauthenticatedError` or `ServerError`. Calls that meet an overloaded or
    unavailable server are retried a few times within their timeout. After
    `close` they raise RuntimeError.

    Raises:
        ValueError: an argument breaks a rule, which the message tells.
    """

    _opened: _Open | None

    def __init__(
        self,
        target: str | Sequence[str] | None = None,
        *,
        timeout: float = _core.DEFAULT_TIMEOUT,
        tls: bool | TLS = False,
        token: str | Callable[[], str] | None = None,
        metadata: Mapping[str, str] | None = None,
        interceptors: Sequence[Interceptor] = (),
        connections: int = 1,
        wait_for_ready: bool = False,
        coalesce: bool = True,
    ) -> None:
        settings = channel_settings(
            target,
            tls=tls,
            token=token,
            metadata=metadata,
            interceptors=checked_interceptors(interceptors, _INTERCEPTORS, "Client"),
            connections=connections,
            wait_for_ready=wait_for_ready,
        )
        super().__init__(settings, timeout)
        self._coalesce = coalesce
        self._streams: weakref.WeakSet[SyncStream] = weakref.WeakSet()

    def __enter__(self) -> Self:
        self._enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls that are under way fail. May be called again."""
        with self._opening:
            self._closed = True
            opened = self._opened
            streams = list(self._streams)
        for stream in streams:
            stream.abandon(RuntimeError(_core.CLOSED))
        if opened is not None:
            opened.gather.close()
            opened.router.close()
            _fork.closed()

    @property
    def _stub(self) -> DigitClassifierStub:
        """What calls are made with, each over one of the connections; opened by the first."""
        return self._open().stub

    def _open(self) -> _Open:
        if self._opened is None:
            with self._opening:
                self._enter()
                if self._opened is None:
                    _fork.check(asyncio=False)
                    self._opened = _Open(self._settings)
        return self._opened

    def _checked_stub(self) -> DigitClassifierStub:
        self._enter()
        return self._stub

    def _after_fork(self) -> None:
        super()._after_fork()
        self._streams = weakref.WeakSet()

    def classify(self, image: Image, *, timeout: float | None = None) -> Prediction:
        """Read the digit in one image.

            >>> with client.Client() as digits:
            ...     prediction = digits.classify("7.png", timeout=5)
            >>> prediction.digit, prediction.probabilities.shape
            (7, (10,))

        Args:
            image: see `client.Image`.
            timeout: seconds for this call; else the client's.
        """
        gather = self._gather()
        if gather is not None and gather.in_company and (pixels := _core.bytes_at_a_glance(image)) is not None:
            seconds = self._seconds(timeout)
            end = time.monotonic() + seconds
            if (prediction := gather.join_unsure(pixels, seconds)) is not None:
                return prediction
            timeout = max(0.001, end - time.monotonic())
        return self._classify_pixels(_core.prepare_bytes(image), timeout)

    def explain(self, image: Image, *, timeout: float | None = None) -> PIL.Image.Image:
        """Draw how an image is read, for people: an RGB picture.

            >>> with client.Client() as digits:
            ...     digits.explain("7.png").save("why.png")

        From left to right it shows the image in grey, what is left of it without
        its paper, what in that was chosen as the digit, the pixels that are sent,
        and the answer with the probabilities of all digits as bars.

        Args:
            image: see `client.Image`.
            timeout: seconds for this call; else the client's.
        """
        return self._explain(image, timeout)[1]

    def _explain(self, image: Image, timeout: float | None) -> tuple[Prediction, PIL.Image.Image]:
        stages = _core.stages_of(image)
        prediction = self._classify_pixels(stages.pixels.tobytes(), timeout)
        return prediction, _explain.draw(stages, prediction)

    def _classify_pixels(self, pixels: bytes, timeout: float | None) -> Prediction:
        gather = self._gather()
        if gather is not None and not gather.begin_alone():
            return gather.join(pixels, self._seconds(timeout))
        try:
            with self._call(timeout) as seconds:
                response = self._stub.Classify(pb.ClassifyRequest(pixels=pixels), timeout=seconds)
        finally:
            if gather is not None:
                gather.end_alone()
        return _core.parse_response(response, 1, self.target)[0]

    def _gather(self) -> SyncGather | None:
        """Where a call may meet others; None if it goes by itself, as one does that has an id of its own."""
        return self._open().gather if self._coalesce and _request_id.given() is None else None

    def classify_batch(
        self, images: Iterable[Image], *, timeout: float | None = None, progress: bool = False
    ) -> list[Prediction]:
        """Read the digits in any number of images; return the answers in their order.

            >>> with client.Client() as digits:
            ...     [prediction.digit for prediction in digits.classify_batch(["3.png", "7.png"])]
            [3, 7]

        All are answered, or the first error is raised; that of a bad image
        tells its `index`. Images are prepared while others are on their way;
        they are read fastest as arrays like MNIST's.

            digits.classify_batch(["a.png", "b.png"])

        Args:
            images: anything to iterate over, also an array `uint8[n, h, w]`.
            timeout: seconds for each message of up to 512 images.
            progress: show a bar (needs tqdm, which the extra `progress` brings).
        """
        return [prediction for chunk in self._exchange(images, timeout, progress) for prediction in chunk]

    def classify_iter(
        self, images: Iterable[Image], *, timeout: float | None = None, progress: bool = False
    ) -> Generator[Prediction, None, None]:
        """As `classify_batch`, but give each answer while the rest is under way.

        Holds a bounded number of images, so that they may be endless. They are
        sent in messages of many: for frames that come one by one there is
        `stream_classify`. An error is raised in the place of its image. Leaving
        the loop ends the calls that are under way.

            >>> with client.Client() as digits:
            ...     for path, prediction in zip(["3.png", "7.png"], digits.classify_iter(["3.png", "7.png"])):
            ...         print(path, prediction.digit)
            3.png 3
            7.png 7

        Args:
            images: see `classify_batch`.
            timeout: see `classify_batch`.
            progress: see `classify_batch`.
        """
        return flat(self._exchange(images, timeout, progress))

    def _exchange(
        self, images: Iterable[Image], timeout: float | None, progress: bool
    ) -> Generator[list[Prediction], None, None]:
        self._seconds(timeout)  # which checks it, now and not when the first answer is taken
        opened = self._open()
        most = MESSAGES_IN_FLIGHT * len(opened.router.links)
        bar = progress_bar(progress, images)
        return exchange(Chunks(images), opened.stub, lambda: self._call(timeout), most, self.target, bar)

    def stream_classify(
        self,
        frames: Iterable[Image],
        *,
        timeout: float | None = None,
        window: int = _core.STREAM_WINDOW,
        latest_only: bool = False,
    ) -> Generator[Prediction | MnistGrpcError, None, None]:
        """Read the digits in a sequence of frames while it goes on.

            >>> with client.Client() as digits:
            ...     for result in digits.stream_classify(["3.png", b"no image", "7.png"]):
            ...         print(result.digit if isinstance(result, client.Prediction) else result)
            3
            the file is no image file of a known format (PNG, JPEG, BMP, GIF, WEBP, TIFF)
            7

        Yields one result a frame, in order: a `Prediction`, or, in the place of
        a frame that could not be read, the error (not raised: the stream goes
        on). What ends the whole stream is raised, also an error of `frames`, after
        the results before it. Leaving the loop ends the call, and closes `frames`
        where it is a generator, once it gives back control.

        If the connection is lost or the server stops, the stream goes on over
        another call with the frames that have no answer yet; each gets exactly one
        result.

        Args:
            frames: iterated in a thread of the client's, up to `window` frames
                ahead of the results that were taken.
            timeout: seconds without an answer while one is owed, lost connections
                included; else the client's.
            window: the most frames whose results were not yet taken.
            latest_only: for live video: a frame that waits for its turn when a
                newer one comes is not read; its result is an `OvertakenError`.
        """
        seconds = self._seconds(timeout)
        _as_array(frames)  # which refuses what is one image
        stream = SyncStream(self._checked_stub, self.target, seconds, _core.checked_window(window), latest_only)
        with self._opening:
            self._streams.add(stream)
        return stream.run(frames)

    def get_model(self, *, timeout: float | None = None) -> Model:
        """Tell what the server serves.

        >>> with client.Client() as digits:
        ...     model = digits.get_model()
        >>> model.name, model.labels[7]
        ('mnist', '7')
        """
        with self._call(timeout) as seconds:
            return _core.parse_model(self._stub.GetModel(pb.GetModelRequest(), timeout=seconds))

    def wait_ready(self, timeout: float = _core.DEFAULT_READY_TIMEOUT) -> None:
        """Wait until the server serves.

            >>> with client.Client() as digits:
            ...     digits.wait_ready(60)
            ...     digits.classify("7.png").digit
            7

        Raises:
            UnavailableError: it does not within `timeout` seconds.
        """
        with self._call(timeout) as seconds:
            router = self._open().router
            watch = router.unary_stream(_core.HEALTH_WATCH, request_serializer=bytes, response_deserializer=bytes)
            waiting = _core.Waiting(self.target, seconds, router.has_several_servers)
            while True:
                call = watch(_core.health_request(), timeout=waiting.seconds_of_call(), wait_for_ready=True)
                try:
                    for status in call:
                        if _core.is_serving(status):
                            return
                except grpc.RpcError as error:
                    waiting.end_of_call(error)
                finally:
                    _core.end_call(call)
                time.sleep(_core.READY_PAUSE)

    def is_serving(self, *, timeout: float | None = None) -> bool:
        """Whether the server answers that it serves; False while it loads or drains.

        >>> with client.Client() as digits:
        ...     digits.is_serving()
        True
        """
        with self._call(timeout) as seconds:
            router = self._open().router
            check = router.unary_unary(_core.HEALTH_CHECK, request_serializer=bytes, response_deserializer=bytes)
            return _core.is_serving(check(_core.health_request(), timeout=seconds))


class _Open:
    """What there is once the connection was opened."""

    def __init__(self, settings: ChannelSettings) -> None:
        self.router = SyncRouter(settings)
        self.stub = DigitClassifierStub(cast(grpc.Channel, self.router))
        self.gather = SyncGather(settings.target, self.stub, len(self.router.links))
