"""Several channels as one: calls are spread over connections, and go past servers that are dead.

What stands here is a channel to generated stubs: it has their three methods,
and adds to each call what goes with it (token, metadata, request id). Knows
nothing of images, and nothing of when a client is open.

One channel balances over the addresses that it resolved and leaves dead ones
alone. For what a channel cannot do (several connections to one address, several
names) there are several channels: a call goes to the one with the fewest open
calls of those that are connected, and a unary call whose server went away is
made at another.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import grpc

from client import _request_id
from client._channel import ChannelSettings, open_aio_channels, open_channels

READY, DOWN = grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE
LOOK_SECONDS = 0.005
"""Between two looks at several servers of which none is connected yet."""

Channel = TypeVar("Channel")


class Link(Generic[Channel]):
    """A channel, which server it leads to, and how many calls it has."""

    def __init__(
        self,
        server: int,
        channel: Channel,
        state: Callable[[bool], grpc.ChannelConnectivity],
        work: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.server = server
        self.channel = channel
        self.state = state
        """How it stands; with True, an idle channel begins to connect."""
        self.work = work
        """Let it go on connecting for so many seconds, where it does that only while somebody waits for it."""
        self.open_calls = 0


class Router(Generic[Channel]):
    """What both kinds of channels have in common: which link is next."""

    def __init__(self, settings: ChannelSettings, links: Sequence[Link[Channel]]) -> None:
        self.links = links
        self.has_several_servers = len(settings.servers) > 1
        self._settings = settings
        self._turn = itertools.count()
        self._lock = threading.Lock()
        if len(links) > 1:
            for link in links:
                link.state(True)

    def take(self, tried: Iterable[int] = ()) -> int:
        """The number of the link for a call that begins now; it ends with `give_back`."""
        if len(self.links) == 1:
            return 0
        first = next(self._turn)
        order = [(first + step) % len(self.links) for step in range(len(self.links))]
        rank = {READY: 0, DOWN: 2}
        states = {number: self.links[number].state(True) for number in order}
        for number, state in states.items():
            if state not in rank:
                self.links[number].work(0)
        with self._lock:
            chosen = min(
                order,
                key=lambda number: (
                    self.links[number].server in tried,
                    rank.get(states[number], 1),
                    self.links[number].open_calls,
                ),
            )
            self.links[chosen].open_calls += 1
        return chosen

    def give_back(self, number: int) -> None:
        if len(self.links) > 1:
            with self._lock:
                self.links[number].open_calls -= 1

    def may_wait(self) -> bool:
        """Whether none of several servers is connected, and one may be soon."""
        states = {link.state(True) for link in self.links}
        return READY not in states and (self._settings.wait_for_ready or states != {DOWN})

    def other_server(self, tried: set[int]) -> bool:
        """Whether a server that was not tried may be there."""
        return any(link.server not in tried and link.state(False) is not DOWN for link in self.links)

    def arguments(self, timeout: float | None, wait_for_ready: bool | None) -> dict[str, Any]:
        """What a call is made with."""
        request_id = _request_id.given() or _request_id.new()
        return {
            "timeout": timeout,
            "metadata": self._settings.metadata_of_call(request_id),
            "wait_for_ready": (self._settings.wait_for_ready or None) if wait_for_ready is None else wait_for_ready,
        }


def _went_away(error: BaseException) -> bool:
    return isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.UNAVAILABLE


def _remaining(arguments: dict[str, Any], deadline: float | None) -> dict[str, Any]:
    if deadline is None:
        return arguments
    return arguments | {"timeout": max(deadline - time.monotonic(), 0.0)}


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


# Synchronous ----------------------------------------------------------------------


class SyncRouter(Router[grpc.Channel]):
    """A channel to stubs."""

    def __init__(self, settings: ChannelSettings) -> None:
        links = [Link(server, channel, *_state_of(channel)) for server, channel in open_channels(settings)]
        if settings.interceptors:
            for link in links:
                link.channel = grpc.intercept_channel(link.channel, *settings.interceptors)
        super().__init__(settings, links)

    def unary_unary(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> SyncUnary:
        return SyncUnary(
            self, [link.channel.unary_unary(method, request_serializer, response_deserializer) for link in self.links]
        )

    def unary_stream(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> Any:
        return SyncStreaming(
            self, [link.channel.unary_stream(method, request_serializer, response_deserializer) for link in self.links]
        )

    def stream_stream(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> Any:
        return SyncStreaming(
            self, [link.channel.stream_stream(method, request_serializer, response_deserializer) for link in self.links]
        )

    def wait_for_a_server(self, deadline: float | None) -> None:
        """With several servers, until one is connected, none can be, or the deadline comes."""
        while self.has_several_servers and self.may_wait():
            if deadline is not None and time.monotonic() >= deadline:
                return
            for link in self.links:
                if link.state(False) is not DOWN:
                    link.work(LOOK_SECONDS / len(self.links))
            time.sleep(LOOK_SECONDS)

    def close(self) -> None:
        for link in self.links:
            link.channel.close()


def _state_of(
    channel: grpc.Channel,
) -> tuple[Callable[[bool], grpc.ChannelConnectivity], Callable[[float], None]]:
    """How a synchronous channel stands, and its `Link.work`.

    `subscribe` would do both, by a thread for each channel that wakes five
    times a second; what that thread asks is asked here. It is needed with old
    versions of grpcio, which connect only while somebody waits. Where others
    wrapped the channel beyond recognition, a call is the only way to find out.
    """
    inner: Any = channel
    while inner is not None and not hasattr(inner, "check_connectivity_state"):
        inner = getattr(inner, "_channel", None)
    if inner is None:
        return lambda _: READY, lambda _: None
    states = {state.value[0]: state for state in grpc.ChannelConnectivity}

    def state(connect: bool) -> grpc.ChannelConnectivity:
        return states.get(inner.check_connectivity_state(connect), READY)

    def work(seconds: float) -> None:
        inner.watch_connectivity_state(inner.check_connectivity_state(False), time.time() + seconds)

    return state, work


class SyncUnary:
    """Calls of one unary method."""

    def __init__(self, router: SyncRouter, calls: Sequence[Any]) -> None:
        self._router = router
        self._calls = calls

    def __call__(self, request: Any, timeout: float | None = None, wait_for_ready: bool | None = None) -> Any:
        router = self._router
        arguments = router.arguments(timeout, wait_for_ready)
        if not router.has_several_servers:
            return self._ask(router.take(), request, arguments)
        deadline, tried = _deadline(timeout), set[int]()
        while True:
            router.wait_for_a_server(deadline)
            number = router.take(tried)
            tried.add(router.links[number].server)
            try:
                return self._ask(number, request, _remaining(arguments, deadline))
            except grpc.RpcError as error:
                if not _went_away(error) or not router.other_server(tried):
                    raise

    def _ask(self, number: int, request: Any, arguments: dict[str, Any]) -> Any:
        try:
            return self._calls[number](request, **arguments)
        finally:
            self._router.give_back(number)

    def future(self, request: Any, timeout: float | None = None, wait_for_ready: bool | None = None) -> Any:
        router = self._router
        arguments = router.arguments(timeout, wait_for_ready)
        if router.has_several_servers:
            return _RoutedFuture(router, self._calls, request, arguments)
        number = router.take()
        call = self._calls[number].future(request, **arguments)
        call.add_done_callback(lambda _: router.give_back(number))
        return call


class _RoutedFuture(concurrent.futures.Future[Any]):
    """A call that is made at another server when its own went away."""

    def __init__(self, router: SyncRouter, calls: Sequence[Any], request: Any, arguments: dict[str, Any]) -> None:
        super().__init__()
        self._router = router
        self._calls = calls
        self._request = request
        self._arguments = arguments
        self._deadline = _deadline(arguments["timeout"])
        self._tried: set[int] = set()
        self.inner: Any = None  # gRPC's call
        router.wait_for_a_server(self._deadline)
        self._ask()

    def cancel(self) -> bool:
        cancelled = super().cancel()
        self.inner.cancel()
        return cancelled

    def _ask(self) -> None:
        number = self._router.take(self._tried)
        self._tried.add(self._router.links[number].server)
        try:
            self.inner = self._calls[number].future(self._request, **_remaining(self._arguments, self._deadline))
        except BaseException:
            self._router.give_back(number)
            raise
        self.inner.add_done_callback(lambda call: self._end(number, call))

    def _end(self, number: int, call: Any) -> None:
        self._router.give_back(number)
        if self.cancelled():
            return
        try:
            error = call.exception()
        except grpc.FutureCancelledError as cancelled:  # by the channel, which was closed
            error = call if isinstance(call, grpc.RpcError) else cancelled
        if error is not None and _went_away(error) and self._router.other_server(self._tried):
            try:
                self._ask()
                return
            except Exception as failed:  # the channel was closed meanwhile; whoever waits has to be told
                error = failed
        if self.set_running_or_notify_cancel():
            if error is None:
                self.set_result(call.result())
            else:
                self.set_exception(error)


class SyncStreaming:
    """Calls of one streaming method. A stream that is lost is the caller's to begin again."""

    def __init__(self, router: SyncRouter, calls: Sequence[Any]) -> None:
        self._router = router
        self._calls = calls

    def __call__(self, request: Any, timeout: float | None = None, wait_for_ready: bool | None = None) -> Any:
        router = self._router
        arguments = router.arguments(timeout, wait_for_ready)
        if timeout is not None:  # a call without one may have a limit of its caller's, who would be held up here
            router.wait_for_a_server(_deadline(timeout))
        number = router.take()
        call = self._calls[number](request, **arguments)
        if not (hasattr(call, "add_callback") and call.add_callback(lambda: router.give_back(number))):
            router.give_back(number)  # it has ended, or others made it something that does not tell its end
        return call


# For asyncio ----------------------------------------------------------------------


class AsyncRouter(Router[grpc.aio.Channel]):
    """A channel to stubs, of the event loop that runs when it is made."""

    def __init__(self, settings: ChannelSettings) -> None:
        links = [
            Link(server, channel, lambda connect, channel=channel: channel.get_state(connect))  # type: ignore[misc]
            for server, channel in open_aio_channels(settings)
        ]
        super().__init__(settings, links)

    def unary_unary(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> AsyncUnary:
        return AsyncUnary(
            self, [link.channel.unary_unary(method, request_serializer, response_deserializer) for link in self.links]
        )

    def unary_stream(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> Any:
        return AsyncStreaming(
            self, [link.channel.unary_stream(method, request_serializer, response_deserializer) for link in self.links]
        )

    def stream_stream(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> Any:
        return AsyncStreaming(
            self, [link.channel.stream_stream(method, request_serializer, response_deserializer) for link in self.links]
        )

    async def wait_for_a_server(self, deadline: float | None) -> None:
        """As `SyncRouter.wait_for_a_server`."""
        while self.has_several_servers and self.may_wait():
            if deadline is not None and time.monotonic() >= deadline:
                return
            await asyncio.sleep(LOOK_SECONDS)

    async def close(self) -> None:
        for link in self.links:
            await link.channel.close()


class AsyncUnary:
    """Calls of one unary method; each is awaited, or cancelled."""

    def __init__(self, router: AsyncRouter, calls: Sequence[Any]) -> None:
        self._router = router
        self._calls = calls

    def __call__(self, request: Any, timeout: float | None = None, wait_for_ready: bool | None = None) -> Any:
        router = self._router
        arguments = router.arguments(timeout, wait_for_ready)
        if router.has_several_servers:
            return asyncio.create_task(self._ask(request, arguments))
        number = router.take()
        call = self._calls[number](request, **arguments)
        if len(self._calls) > 1:
            call.add_done_callback(lambda _: router.give_back(number))
        return call

    async def _ask(self, request: Any, arguments: dict[str, Any]) -> Any:
        router = self._router
        deadline, tried = _deadline(arguments["timeout"]), set[int]()
        while True:
            await router.wait_for_a_server(deadline)
            number = router.take(tried)
            tried.add(router.links[number].server)
            try:
                return await self._calls[number](request, **_remaining(arguments, deadline))
            except grpc.RpcError as error:
                if not _went_away(error) or not router.other_server(tried):
                    raise
            finally:
                router.give_back(number)


class AsyncStreaming:
    """As `SyncStreaming`, but a stream does not wait for a server to be connected."""

    def __init__(self, router: AsyncRouter, calls: Sequence[Any]) -> None:
        self._router = router
        self._calls = calls

    def __call__(self, *request: Any, timeout: float | None = None, wait_for_ready: bool | None = None) -> Any:
        router = self._router
        arguments = router.arguments(timeout, wait_for_ready)
        number = router.take()
        call = self._calls[number](*request, **arguments)
        if len(self._calls) > 1:
            call.add_done_callback(lambda _: router.give_back(number))
        return call
