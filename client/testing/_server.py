"""The fake server: a script, a gRPC server that follows it, and a relay before that."""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from types import TracebackType
from typing import Self, cast

import grpc

from client._errors import MnistGrpcError
from client._types import Model
from client.testing._answers import Answers, ScriptError
from client.testing._faults import Action, Delay, Drop, Hang, status_of
from client.testing._health import State, health_handler
from client.testing._relay import HOST, Relay
from client.testing._script import Request, Script
from client.testing._servicer import Servicer
from client.testing._threads import CallThreads
from protos.mnist.v1.digit_classifier_pb2_grpc import add_DigitClassifierServicer_to_server

PATIENCE = 10.0  # seconds until what a test waits for will not come

_SHA256 = hashlib.sha256(b"client.testing").hexdigest()
MODEL = Model(
    name="mnist",
    version=_SHA256[:12],
    architecture="FakeServer",
    weights_sha256=_SHA256,
    parameter_count=0,
    labels=tuple("0123456789"),
    normalization_mean=0.5,
    normalization_std=0.5,
    temperature=1.0,
    test_accuracy=None,
    dataset="",
    server_version="fake",
    max_batch_size=256,
    max_message_bytes=4 * 1024 * 1024,
    digit_threshold=2.0,
)


class FakeServer:
    """A digit server for tests, in threads of this process, that does what it is told.

    A context manager; otherwise `start` and `close`. It listens on a free port
    of this machine, speaks the contract `mnist.v1.DigitClassifier` and
    `grpc.health.v1.Health`, and may be used from any thread and beside any event
    loop: it has its own.

    Unless `answers` says otherwise it answers the digit of the most similar of
    twenty samples, with a confidence of 0.99: right for `digit_png`, and for
    other handwriting no more than a guess.

        >>> from client.testing import FakeServer, digit_png
        >>> with FakeServer() as server, client.Client(server.target) as digits:
        ...     server.answers = [3, (1, 0.55)]
        ...     server.fail_next(client.OverloadedError, times=2, retry_after=0.05)
        ...     digits.classify_batch([digit_png(7)] * 2)
        ...     [request.pixels.shape for request in server.requests]
        [Prediction(digit=3, confidence=0.9900), Prediction(digit=1, confidence=0.5500)]
        [(2, 784), (2, 784), (2, 784)]

    The end of the `with` block raises an `AssertionError` if the test went wrong
    unseen: if answers were used up or broken, or a fault that was ordered never
    came.
    """

    def __init__(self, answers: Answers | None = None) -> None:
        self._script = Script()
        self._state = State(MODEL)
        self._relay: Relay | None = None
        self._server: grpc.Server | None = None
        self._closed = False
        if answers is not None:
            self.answers = answers

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is None:
            self.verify()

    def start(self) -> Self:
        """Listen; return the server itself."""
        if self._closed or self._server is not None:
            raise RuntimeError("a FakeServer is started once; make a new one")
        executor = cast(futures.ThreadPoolExecutor, CallThreads())  # gRPC uses no more of it than `submit`
        self._server = grpc.server(executor)
        self._server.add_generic_rpc_handlers((health_handler(self._state),))
        servicer = Servicer(self._script, self._state, self._cut)
        add_DigitClassifierServicer_to_server(servicer, self._server)
        port = self._server.add_insecure_port(f"{HOST}:0")
        self._server.start()
        self._relay = Relay(port)
        return self

    def close(self) -> None:
        """Stop; calls that hang end. May be called again."""
        if self._server is not None and self._relay is not None and not self._closed:
            self._closed = True
            self._state.close()
            self._server.stop(None).wait()
            self._relay.close()

    def verify(self) -> None:
        """Raise what went wrong unseen; a `with` block does so at its end.

        Raises:
            AssertionError: answers were used up or broken, or a fault never came.
        """
        if complaints := self._script.complaints():
            raise AssertionError("FakeServer: " + "; ".join(complaints))

    @property
    def target(self) -> str:
        """`host:port`, for `Client`, `AsyncClient` or `MNIST_GRPC_TARGET`."""
        return f"{HOST}:{self._running.port}"

    # Answers.

    @property
    def answers(self) -> Answers | None:
        """What is answered from now on; None for the digit of the most similar sample.

        One digit for all images; or an iterable with an answer for each, in the
        order of their arrival; or a function of an image's pixels, `uint8[784]`,
        which is called in threads.

        An answer is a digit (`7`), a digit and its confidence (`(7, 0.55)`), ten
        probabilities, or an error of `client`, which ends a call, and in a stream
        takes the frame's place. When an iterable is used up, calls fail with
        INTERNAL, and so does the test.

        The digit score is ten times the confidence, and `model.digit_threshold`
        is 2, so `(7, 0.15)` looks like no digit.
        """
        return self._script.answers

    @answers.setter
    def answers(self, answers: Answers | None) -> None:
        self._script.answers = answers

    @property
    def model(self) -> Model:
        """What `get_model` tells; assign another, as `dataclasses.replace(server.model, version="another")`.

        Its version, labels and digit threshold also stand in answers.
        """
        return self._state.model

    @model.setter
    def model(self, model: Model) -> None:
        self._state.model = model

    @property
    def serving(self) -> bool:
        """Whether health says SERVING and calls are answered; when False they end with UNAVAILABLE."""
        return self._state.serving

    @serving.setter
    def serving(self, serving: bool) -> None:
        self._state.set_serving(serving)

    # Faults.

    def fail_next(
        self,
        error: type[MnistGrpcError] | MnistGrpcError | str | enum.Enum,
        *,
        times: int = 1,
        retry_after: float | None = None,
        after: int = 0,
    ) -> None:
        """Let the next calls fail.

        Args:
            error: an error of `client`, as a class or with a message; or a gRPC
                status, as `"DATA_LOSS"` or `grpc.StatusCode.DATA_LOSS`.
            times: how many calls.
            retry_after: after how many seconds the client shall try again by
                itself, which it does three times at most; each try is a call.
                None tells it not to, so that one call of yours fails.
            after: of a stream, how many frames are answered before.
        """
        if retry_after is not None and not 0 <= retry_after < math.inf:
            raise ScriptError(f"retry_after is a number of seconds, 0 or more, not {retry_after!r}")
        self._add(status_of(error, retry_after), "fail_next", times, after)

    def delay_next(self, seconds: float, *, times: int = 1, after: int = 0) -> None:
        """Let the next calls wait before they are answered; `times` and `after` as for `fail_next`."""
        if not 0 <= seconds < math.inf:
            raise ScriptError(f"a delay is a number of seconds, 0 or more, not {seconds!r}")
        self._add(Delay(seconds), "delay_next", times, after)

    def hang_next(self, *, times: int = 1, after: int = 0) -> None:
        """Let the next calls have no answer at all, until their deadline; `times` and `after` as for `fail_next`."""
        self._add(Hang(), "hang_next", times, after)

    def drop_connection_next(self, *, times: int = 1, after: int = 0) -> None:
        """Cut the connection of the next calls; `times` and `after` as for `fail_next`.

        The client tries again by itself where it can. With `after`, it may not
        have read all answers that were sent before the cut.
        """
        self._add(Drop(), "drop_connection_next", times, after)

    @contextmanager
    def unreachable(self) -> Iterator[None]:
        """While the block runs, connections are cut and refused, as if no server ran."""
        relay = self._running
        relay.refuse()
        try:
            yield
        finally:
            relay.accept()

    @contextmanager
    def silent(self) -> Iterator[None]:
        """While the block runs, connections are accepted and nothing is said over any, as by a network that is cut."""
        relay = self._running
        relay.be_silent()
        try:
            yield
        finally:
            relay.speak()

    # What came.

    @property
    def requests(self) -> list[Request]:
        """What came to be classified, also what then failed or was tried again, in order.

        A stream's messages are requests of their own. How many images the
        client puts into one message is its own choice.
        """
        return self._script.requests

    def wait_for_requests(self, count: int = 1, timeout: float = PATIENCE) -> list[Request]:
        """Wait until so many have come; return all.

        In an async test, use `await asyncio.to_thread(server.wait_for_requests)`.

        Raises:
            AssertionError: fewer came within `timeout` seconds.
        """
        return self._script.wait_for_requests(count, timeout)

    def reset(self) -> None:
        """Forget answers, faults, mistakes and requests; serve again, with the first model."""
        self._script.forget()
        self._state.model = MODEL
        self._state.set_serving(True)

    def _add(self, action: Action, name: str, times: int, after: int) -> None:
        self._script.add_fault(action, name, times, after)

    def _cut(self, port: int) -> None:
        self._running.cut(port)

    @property
    def _running(self) -> Relay:
        if self._relay is None:
            raise RuntimeError("the FakeServer has not started; use `with FakeServer() as server:`")
        return self._relay
