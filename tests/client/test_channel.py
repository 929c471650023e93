"""Where calls go and what goes with them: targets, several servers and connections, metadata, state."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest

import client
from client import _channel
from client._batch import FIRST_IMAGES
from protos.mnist.v1 import digit_classifier_pb2 as pb

if TYPE_CHECKING:
    from tests.client.conftest import Connect, Fakes, Running

GreyImage = npt.NDArray[np.uint8]
KINDS: list[Callable[..., Any]] = [client.Client, client.AsyncClient]
TOKEN = "a-token-0123456789"


def servers(*target: Any, **options: Any) -> tuple[str, ...]:
    """gRPC's targets."""
    return _channel.channel_settings(*target, **options).servers


# Targets --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("localhost", "localhost:50051"),
        ("digits.example", "digits.example:50051"),
        ("localhost:1234", "localhost:1234"),
        ("10.0.0.1", "10.0.0.1:50051"),
        ("[::1]", "[::1]:50051"),
        ("[::1]:1234", "[::1]:1234"),
        ("::1", "[::1]:50051"),
        ("dns:///digits", "dns:///digits:50051"),
        ("dns:///digits:1234", "dns:///digits:1234"),
        ("dns://10.0.0.53/digits:1234", "dns://10.0.0.53/digits:1234"),
        ("dns:digits", "dns:digits:50051"),
        ("unix:/run/digits.sock", "unix:/run/digits.sock"),
        ("unix:///run/digits.sock", "unix:///run/digits.sock"),
        ("ipv4:10.0.0.1:1,10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2"),
        ("ipv4:10.0.0.1", "ipv4:10.0.0.1:50051"),
        ("ipv6:[::1]:1,::2", "ipv6:[::1]:1,[::2]:50051"),
        ("  localhost:1234\n", "localhost:1234"),
        (["one", "two:2"], "one:50051,two:2"),
        ("one, two:2", "one:50051,two:2"),
        (["one", "one:50051"], "one:50051"),
        (("one",), "one:50051"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_target_means_what_one_expects(kind: Callable[..., Any], given: Any, meant: str) -> None:
    assert kind(given).target == meant


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("http://localhost:1234", r"not a URL.*Client\('localhost:1234'\)$"),
        ("https://localhost:1234/path", r"not a URL.*Client\('localhost:1234', tls=True\)$"),
        ("grpc://localhost", "not a URL"),
        ([], "the list of servers is empty"),
        (["localhost", ""], "a target is host:port"),
        ("one,,two", "a target is host:port"),
        ("local host", "a target is host:port"),
        ("localhost:port", "port from 1 to 65535"),
        ("localhost:0", "port from 1 to 65535"),
        ("localhost:65536", "port from 1 to 65535"),
        ("localhost:", "port from 1 to 65535"),
        (":50051", "port from 1 to 65535"),
        ("localhost/path", "port from 1 to 65535"),
        ("fe80::nonsense:1", "in brackets"),
        ("ipv4:digits:1", "after ipv4: comes an IPv4 address and its port, not 'digits'"),
        ("ipv4:[::1]:1", "after ipv4: comes an IPv4 address"),
        ("ipv6:10.0.0.1:1", "after ipv6: comes an IPv6 address"),
        ("ipv4:10.0.0.1:0", "port from 1 to 65535"),
        ("ipv4:", "port from 1 to 65535"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_target_that_is_none_is_refused_with_the_rule(kind: Callable[..., Any], given: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        kind(given)


@pytest.mark.parametrize("given", [50051, [50051], b"localhost"])
def test_a_target_is_text(given: Any) -> None:
    with pytest.raises(TypeError, match="a target is text"):
        client.Client(given)


def test_the_environment_may_name_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIST_GRPC_TARGET", "one,two:2")
    assert client.Client().target == "one:50051,two:2"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (["10.0.0.1", "10.0.0.2:2"], ("ipv4:10.0.0.1:50051,10.0.0.2:2",)),
        (["[2001:db8::1]:1", "2001:db8::2"], ("ipv6:[2001:db8::1]:1,[2001:db8::2]:50051",)),
        (["10.0.0.1", "[2001:db8::1]:1"], ("ipv4:10.0.0.1:50051", "ipv6:[2001:db8::1]:1")),
        (["one", "10.0.0.1", "two", "10.0.0.2"], ("ipv4:10.0.0.1:50051,10.0.0.2:50051", "one:50051", "two:50051")),
        (["unix:/a", "unix:/b"], ("unix:/a", "unix:/b")),
    ],
)
def test_literal_addresses_are_one_target_of_grpc_and_names_are_each_one(
    target: Sequence[str], expected: tuple[str, ...]
) -> None:
    assert servers(target) == expected


def test_literal_addresses_are_apart_where_each_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    several = ["10.0.0.1:1", "10.0.0.2:2"]
    assert servers(several, tls=True) == ("10.0.0.1:1", "10.0.0.2:2")
    assert servers(several, tls=client.TLS(server_name="digits")) == ("ipv4:10.0.0.1:1,10.0.0.2:2",)
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    assert servers(several) == ("10.0.0.1:1", "10.0.0.2:2")


# Several servers ------------------------------------------------------------------


class Counting:
    """Servers that count who calls them."""

    def __init__(self, fakes: Fakes) -> None:
        self.peers: dict[str, Counter[str]] = {}
        self._fakes = fakes

    def serve(self, **options: Any) -> str:
        peers: Counter[str] = Counter()

        def classify(request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
            peers[context.peer()] += 1
            return self._fakes.answer(request)

        def stream(messages: Iterable[pb.StreamClassifyRequest], context: Any) -> Iterator[pb.StreamClassifyResponse]:
            peers[context.peer()] += 1
            yield from map(self._fakes.answer_frames, messages)

        address = self._fakes.serve(classify=classify, stream=stream, **options)
        self.peers[address] = peers
        return address

    def calls(self) -> list[int]:
        return [sum(peers.values()) for peers in self.peers.values()]


@pytest.fixture
def counting(fakes: Fakes) -> Counting:
    return Counting(fakes)


def by_name(address: str) -> str:
    return address.replace("127.0.0.1", "localhost")


SPELLINGS: list[Callable[[str], str]] = [str, by_name]


@pytest.mark.parametrize("spelled", SPELLINGS, ids=["literals", "names"])
def test_calls_are_spread_over_several_servers(
    connect: Connect, counting: Counting, digits: list[GreyImage], spelled: Callable[[str], str]
) -> None:
    twin = connect([spelled(counting.serve()) for _ in range(3)])
    for _ in range(200):
        assert twin.classify(digits[7]).digit == 7
        if min(counting.calls()) >= 10:
            break
    assert min(counting.calls()) >= 10


@pytest.mark.parametrize("place", ["nobody", "black_hole", "no such name"])
@pytest.mark.parametrize("spelled", SPELLINGS, ids=["literals", "names"])
def test_a_dead_one_among_several_servers_fails_no_call(
    connect: Connect,
    fakes: Fakes,
    counting: Counting,
    digits: list[GreyImage],
    spelled: Callable[[str], str],
    place: str,
) -> None:
    dead = "nosuch.invalid:50051" if place == "no such name" else spelled(getattr(fakes, place)())
    twin = connect([dead, spelled(counting.serve()), spelled(counting.serve())], timeout=5)
    assert [twin.classify(digits[7]).digit for _ in range(20)] == [7] * 20
    assert len(twin.classify_batch([digits[3]] * 3000)) == 3000
    assert len(list(twin.stream_classify(digits))) == 20
    assert min(counting.calls()) > 0


@pytest.mark.parametrize("method", ["classify", "classify_batch"])
@pytest.mark.parametrize("spelled", SPELLINGS, ids=["literals", "names"])
def test_a_server_that_goes_away_fails_no_call_while_another_is_there(
    connect: Connect,
    fakes: Fakes,
    counting: Counting,
    digits: list[GreyImage],
    spelled: Callable[[str], str],
    method: str,
) -> None:
    addresses = [counting.serve() for _ in range(2)]
    twin = connect([spelled(address) for address in addresses])

    def read() -> int:
        return twin.classify(digits[7]).digit if method == "classify" else twin.classify_batch([digits[7]])[0].digit

    while min(counting.calls()) == 0:
        assert read() == 7
    fakes.stop(addresses[0])
    assert [read() for _ in range(20)] == [7] * 20


@pytest.mark.parametrize("method", ["classify", "classify_batch", "get_model", "is_serving"])
def test_several_servers_of_which_none_is_there_are_told_as_one_is(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], method: str
) -> None:
    addresses = [by_name(fakes.nobody()) for _ in range(2)]
    arguments = {"classify": (digits[7],), "classify_batch": (digits,)}.get(method, ())
    with pytest.raises(client.UnavailableError, match=rf"^{addresses[0]},{addresses[1]}: no server answers there"):
        getattr(connect(addresses), method)(*arguments)


def test_several_servers_are_waited_for_until_one_serves(
    connect: Connect, fakes: Fakes, start: Callable[..., Running]
) -> None:
    def watch(*_: Any) -> Iterator[bytes]:
        yield b"\x08\x01"

    dead, port = fakes.nobody(), fakes.nobody().rpartition(":")[2]
    waiting = start(connect([by_name(dead), f"localhost:{free_port()}"]).wait_ready, 0.3)
    with pytest.raises(client.UnavailableError, match="not serving within"):
        waiting.result()
    twin = connect([by_name(dead), by_name(fakes.serve(watch=watch))])
    assert start(twin.wait_ready, 10).result() is None
    assert port


def free_port() -> int:
    with socket.socket() as finder:
        finder.bind(("127.0.0.1", 0))
        return int(finder.getsockname()[1])


def test_a_timeout_holds_over_several_servers(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running]
) -> None:
    twin = connect([by_name(fakes.black_hole()), by_name(fakes.black_hole())], timeout=0.3)
    for call in (lambda: twin.classify(digits[7]), lambda: twin.classify_batch(digits), twin.get_model):
        with pytest.raises(client.DeadlineExceededError, match=r"0\.3 s"):
            start(call).result(within=5)


def test_a_batch_may_be_left_over_several_servers(connect: Connect, fakes: Fakes, digits: list[GreyImage]) -> None:
    begun, ended = threading.Event(), threading.Event()

    def classify(request: Any, context: Any) -> Any:
        if len(request.pixels) == FIRST_IMAGES * 784:
            return fakes.answer(request)
        context.add_callback(ended.set)
        begun.set()
        fakes.stopping.wait(20)
        return None

    twin = connect([by_name(fakes.serve(classify=classify)), by_name(fakes.nobody())])
    answers = twin.classify_iter(digits * 10)
    assert next(answers).digit == 0
    assert begun.wait(10)
    answers.close()
    assert ended.wait(10)


@pytest.mark.parametrize("method", ["classify", "classify_batch", "get_model"])
def test_closing_ends_a_call_at_one_of_several_servers_and_says_so(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running], method: str
) -> None:
    arrived = threading.Event()

    def never(_: Any, context: Any) -> None:
        arrived.set()
        fakes.stopping.wait(20)
        context.abort(grpc.StatusCode.CANCELLED, "the test is over")

    twin = connect([by_name(fakes.serve(classify=never, get_model=never)), by_name(fakes.nobody())])
    arguments = {"classify": (digits[7],), "classify_batch": (digits,)}.get(method, ())
    running = start(getattr(twin, method), *arguments)
    assert arrived.wait(10)
    twin.close()
    with pytest.raises(RuntimeError, match="the client is closed"):
        running.result(within=5)


# Several connections --------------------------------------------------------------


def test_a_client_has_one_connection(connect: Connect, counting: Counting, digits: list[GreyImage]) -> None:
    address = counting.serve()
    for _ in range(2):
        twin = connect(address)
        assert [twin.classify(digits[7]).digit for _ in range(10)] == [7] * 10
    assert sorted(counting.peers[address].values()) == [10, 10]  # and another client another one


def test_calls_are_spread_over_several_connections(
    connect: Connect, counting: Counting, digits: list[GreyImage]
) -> None:
    address = counting.serve()
    twin = connect(address, connections=4)
    while len(counting.peers[address]) < 4:
        assert twin.classify(digits[7]).digit == 7
    counting.peers[address].clear()
    for _ in range(40):
        twin.classify(digits[7])
    assert sorted(counting.peers[address].values()) == [10] * 4
    for _ in range(4):
        assert len(list(twin.stream_classify(digits))) == 20
    assert sorted(counting.peers[address].values()) == [11] * 4
    assert len(twin.classify_batch([digits[7]] * 1025)) == 1025
    assert all(calls > 11 for calls in counting.peers[address].values())


def test_the_connection_with_the_fewest_open_calls_is_next(
    connect: Connect, counting: Counting, digits: list[GreyImage]
) -> None:
    address = counting.serve()
    twin = connect(address, connections=2)
    while len(counting.peers[address]) < 2:
        assert twin.classify(digits[7]).digit == 7
    counting.peers[address].clear()
    stream = twin.stream_classify(iter(digits), window=1)
    next(stream)
    for _ in range(10):
        assert twin.classify(digits[7]).digit == 7
    assert sorted(counting.peers[address].values()) == [1, 10]
    stream.close()


@pytest.mark.parametrize("wrong", [0, -1, 129, 1.5, "2"])
@pytest.mark.parametrize("kind", KINDS)
def test_connections_are_a_number(kind: Callable[..., Any], wrong: Any) -> None:
    with pytest.raises(ValueError, match="connections is a number from 1 to 128"):
        kind("there:1", connections=wrong)


# Other ways -----------------------------------------------------------------------


def test_a_unix_socket_is_a_target(connect: Connect, fakes: Fakes, digits: list[GreyImage], tmp_path: Path) -> None:
    address = fakes.serve(unix=f"unix:{tmp_path}/s")
    twin = connect(address, token=TOKEN)  # in plaintext, as it does not leave the machine
    assert twin.classify(digits[7]).digit == 7
    with pytest.raises(client.UnavailableError, match=rf"^unix:{tmp_path}/none: no server answers there"):
        connect(f"unix:{tmp_path}/none").classify(digits[7])


def test_calls_wait_for_a_server_that_is_not_there_yet_if_they_are_told_to(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running]
) -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(10)
        port = listener.getsockname()[1]
        waiting = start(connect(f"127.0.0.1:{port}", wait_for_ready=True, timeout=20).classify, digits[7])
        for _ in range(6):  # more often than retries would try
            listener.accept()[0].close()
    fakes.serve(port=port)
    assert waiting.result().digit == 7


def test_a_call_that_waits_for_its_server_ends_with_its_timeout(
    connect: Connect, fakes: Fakes, digits: list[GreyImage]
) -> None:
    with pytest.raises(client.DeadlineExceededError, match=r"0\.3 s"):
        connect(fakes.nobody(), wait_for_ready=True).classify(digits[7], timeout=0.3)
    several = [by_name(fakes.nobody()), by_name(fakes.nobody())]
    with pytest.raises(client.MnistGrpcError):
        connect(several, wait_for_ready=True).classify(digits[7], timeout=0.3)


@pytest.mark.parametrize("method", ["classify", "classify_batch", "get_model", "is_serving", "wait_ready"])
def test_a_server_that_accepts_and_never_answers_costs_the_timeout_and_no_more(
    connect: Connect, fakes: Fakes, digits: list[GreyImage], start: Callable[..., Running], method: str
) -> None:
    address = fakes.black_hole()
    call = getattr(connect(address), method)
    arguments = {"classify": (digits[7],), "classify_batch": (digits,)}.get(method, ())
    expected = client.UnavailableError if method == "wait_ready" else client.DeadlineExceededError
    with pytest.raises(expected, match=rf"^{address}: .*within 0\.3 s; "):
        start(lambda: call(*arguments, timeout=0.3)).result(within=5)


# Metadata, tokens and ids ---------------------------------------------------------


class Listening:
    """A server that keeps what came with each call, and refuses when it is told to."""

    def __init__(self, fakes: Fakes) -> None:
        self.heard: list[dict[str, Any]] = []
        self.refuse_with: tuple[grpc.StatusCode, str] | None = None
        self._fakes = fakes
        self.address = fakes.serve(classify=self._classify, stream=self._stream, get_model=self._model)

    def _note(self, context: Any) -> None:
        metadata = context.invocation_metadata()
        assert len({key for key, _ in metadata}) == len(metadata)
        self.heard.append(dict(metadata))
        if self.refuse_with is not None:
            context.abort(*self.refuse_with)

    def _classify(self, request: Any, context: Any) -> Any:
        self._note(context)
        return self._fakes.answer(request)

    def _stream(self, messages: Any, context: Any) -> Any:
        self._note(context)
        yield from map(self._fakes.answer_frames, messages)

    def _model(self, _: Any, context: Any) -> Any:
        self._note(context)
        return pb.GetModelResponse()

    def ids(self) -> list[str]:
        return [metadata["x-request-id"] for metadata in self.heard]


@pytest.fixture
def listening(fakes: Fakes) -> Listening:
    return Listening(fakes)


def call_everything(twin: Any, digits: list[GreyImage]) -> None:
    twin.classify(digits[7])
    twin.classify_batch(digits)
    twin.get_model()
    list(twin.stream_classify(digits))


def test_metadata_and_a_token_go_with_every_call(
    connect: Connect, listening: Listening, digits: list[GreyImage]
) -> None:
    call_everything(connect(listening.address, metadata={"tenant": "blue", "x-trace": "7"}, token=TOKEN), digits)
    assert len(listening.heard) == 4
    for metadata in listening.heard:
        assert metadata.items() >= {"tenant": "blue", "x-trace": "7", "authorization": f"Bearer {TOKEN}"}.items()


def test_every_call_has_an_id_of_its_own(connect: Connect, listening: Listening, digits: list[GreyImage]) -> None:
    call_everything(connect(listening.address), digits)
    assert len(set(listening.ids())) == 4
    assert all(len(each) == 16 and int(each, 16) >= 0 for each in listening.ids())


def test_the_messages_of_a_batch_have_one_id(connect: Connect, listening: Listening, digits: list[GreyImage]) -> None:
    connect(listening.address).classify_batch([digits[7]] * 3000)
    assert len(listening.ids()) > 1
    assert len(set(listening.ids())) == 1


def test_an_error_has_the_id_that_was_sent(connect: Connect, listening: Listening, digits: list[GreyImage]) -> None:
    listening.refuse_with = (grpc.StatusCode.INTERNAL, "no")
    twin = connect(listening.address)
    for call in (lambda: twin.classify(digits[7]), lambda: twin.classify_batch(digits), twin.get_model):
        with pytest.raises(client.ServerError) as caught:
            call()
        assert caught.value.request_id == listening.ids()[-1]


def test_an_error_without_an_answer_has_an_id_too(connect: Connect, fakes: Fakes, digits: list[GreyImage]) -> None:
    with pytest.raises(client.DeadlineExceededError) as caught:
        connect(fakes.black_hole()).classify(digits[7], timeout=0.2)
    assert caught.value.request_id


def test_the_real_server_returns_the_id_with_its_errors(
    connect: Connect, server_address: str, digits: list[GreyImage]
) -> None:
    twin = connect(server_address)
    with client.request_id("mine-7"), pytest.raises(client.DeadlineExceededError) as caught:
        twin.classify_batch([digits[7]] * 5_000, timeout=1e-3)  # a single image is sometimes answered within that
    assert caught.value.request_id == "mine-7"


def test_a_caller_may_give_an_id(listening: Listening, digits: list[GreyImage]) -> None:
    with client.Client(listening.address) as twin:
        with client.request_id("outer"):
            call_everything(twin, digits)
            with client.request_id("inner"):
                twin.classify(digits[7])
            twin.classify(digits[7])
        twin.classify(digits[7])
    *given, last = listening.ids()
    assert given == ["outer"] * 4 + ["inner", "outer"]
    assert last not in given


async def test_tasks_have_ids_of_their_own(listening: Listening, digits: list[GreyImage]) -> None:
    async def read(number: int) -> None:
        with client.request_id(f"task-{number}"):
            await asyncio.sleep(0)
            await twin.classify(digits[7])

    async with client.AsyncClient(listening.address) as twin:
        await asyncio.gather(*(read(number) for number in range(10)))
    assert sorted(listening.ids()) == sorted(f"task-{number}" for number in range(10))


@pytest.mark.parametrize("wrong", ["", "x" * 129, "two\nlines", "grün"])
def test_an_id_is_printable(wrong: str) -> None:
    with pytest.raises(ValueError, match="a request id is 1 to 128 printable ASCII"), client.request_id(wrong):
        pytest.fail("entered")


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_does_not_leave_the_machine_in_plaintext(kind: Callable[..., Any]) -> None:
    for local in ("localhost", "127.0.0.1:1", "127.1.2.3:1", "[::1]:1", "unix:/run/digits.sock", "dns:///localhost:1"):
        kind(local, token=TOKEN)
    kind("digits.example", token=TOKEN, tls=True)
    kind("digits.example", metadata={"authorization": f"Bearer {TOKEN}"})
    for target in ("digits.example", "10.0.0.1:1", ["localhost:1", "digits.example"], "localhost.example:1"):
        with pytest.raises(ValueError, match=r"not sent in plaintext.*tls=True.*metadata=") as caught:
            kind(target, token=TOKEN)
        assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("wrong", ["", " ", "two words", "grün", "two\nlines"])
def test_a_token_that_is_none_is_refused_and_not_shown(wrong: str) -> None:
    with pytest.raises(ValueError, match="a token is printable ASCII without spaces") as caught:
        client.Client("localhost", token=wrong)
    assert wrong.strip() == "" or wrong not in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"Tenant": "x"}, "lower-case"),
        ({"grpc-timeout": "1"}, "grpc-"),
        ({"trace-bin": "1"}, "-bin"),
        ({"": "x"}, "a key of metadata"),
        ({"tenant": "two\nlines"}, "tenant is not printable"),
        ({"tenant": 7}, "tenant is not printable"),
        ({"x-request-id": "7"}, "client.request_id"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_metadata_that_grpc_would_not_send_is_refused(kind: Callable[..., Any], metadata: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        kind("localhost", metadata=metadata)


def test_one_authorization_is_enough() -> None:
    with pytest.raises(ValueError, match="give one of the two"):
        client.Client("localhost", token=TOKEN, metadata={"authorization": "Basic abc"})


def test_secrets_are_not_shown(fakes: Fakes) -> None:
    settings = _channel.channel_settings("localhost", token=TOKEN, metadata={"api-key": "secret-of-mine"})
    twin = client.Client("localhost", token=TOKEN, metadata={"api-key": "secret-of-mine"})
    assert TOKEN not in repr(settings) + repr(twin)
    assert "secret-of-mine" not in repr(settings) + repr(twin)


# Interceptors ---------------------------------------------------------------------


class SyncSpy(grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
    def __init__(self) -> None:
        self.methods: list[str] = []

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        self.methods.append(details.method)
        return continuation(details, request)

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        self.methods.append(details.method)
        return continuation(details, requests)


class AsyncSpy(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self) -> None:
        self.methods: list[str] = []

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        method = details.method
        self.methods.append(method if isinstance(method, str) else method.decode())
        return await continuation(details, request)


@pytest.mark.parametrize("options", [{}, {"connections": 2}], ids=["one connection", "two connections"])
def test_interceptors_see_the_calls(listening: Listening, digits: list[GreyImage], options: dict[str, Any]) -> None:
    spy = SyncSpy()
    with client.Client(listening.address, interceptors=[spy], **options) as twin:
        call_everything(twin, digits)
    service = "/mnist.v1.DigitClassifier/"
    assert spy.methods == [service + name for name in ("Classify", "Classify", "GetModel", "StreamClassify")]


@pytest.mark.parametrize("options", [{}, {"connections": 2}], ids=["one connection", "two connections"])
async def test_asynchronous_interceptors_see_the_calls(
    listening: Listening, digits: list[GreyImage], options: dict[str, Any]
) -> None:
    spy = AsyncSpy()
    async with client.AsyncClient(listening.address, interceptors=[spy], **options) as twin:
        assert (await twin.classify(digits[7])).digit == 7
        await twin.classify_batch(digits)
        await twin.get_model()
    service = "/mnist.v1.DigitClassifier/"
    assert spy.methods == [service + name for name in ("Classify", "Classify", "GetModel")]


@pytest.mark.parametrize(
    ("kind", "wrong"), [(client.Client, AsyncSpy()), (client.AsyncClient, SyncSpy()), (client.Client, print)]
)
def test_an_interceptor_of_the_other_kind_is_refused(kind: Callable[..., Any], wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"an interceptor of {kind.__name__} is a grpc"):
        kind("localhost", interceptors=[wrong])


# Not yet open, open, closed -------------------------------------------------------


def test_a_client_tells_its_state(connect: Connect, fakes: Fakes, digits: list[GreyImage]) -> None:
    address = fakes.serve()
    twin = connect(address)
    name = repr(twin).split()[0]
    assert repr(twin) == f"{name} to {address}, not yet open>"
    twin.classify(digits[7])
    assert repr(twin) == f"{name} to {address}, open>"
    twin.close()
    assert repr(twin) == f"{name} to {address}, closed>"


async def test_a_closed_client_cannot_be_entered() -> None:
    twin = client.Client("localhost")
    with twin:
        pass
    with pytest.raises(RuntimeError, match="the client is closed; make a new one"), twin:
        pytest.fail("entered")
    awaited = client.AsyncClient("localhost")
    async with awaited:
        pass
    with pytest.raises(RuntimeError, match="the client is closed; make a new one"):
        await awaited.__aenter__()


def test_a_client_that_is_dropped_open_is_warned_of(fakes: Fakes, digits: list[GreyImage]) -> None:
    address = fakes.serve()
    twin = client.Client(address)
    twin.classify(digits[7])
    with pytest.warns(ResourceWarning, match=rf"<Client to {address}, open> was never closed"):
        del twin


async def test_an_async_client_that_is_dropped_open_is_warned_of(fakes: Fakes, digits: list[GreyImage]) -> None:
    address = fakes.serve()
    twin = client.AsyncClient(address)
    await twin.classify(digits[7])
    with pytest.warns(ResourceWarning, match=rf"<AsyncClient to {address}, open> was never closed"):
        del twin


def test_a_client_that_is_dropped_unopened_or_closed_is_not_warned_of(fakes: Fakes, digits: list[GreyImage]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        client.Client("localhost")
        client.AsyncClient("localhost")
        with client.Client(fakes.serve()) as twin:
            twin.classify(digits[7])
        del twin
        with pytest.raises(ValueError, match="timeout"):
            client.Client("localhost", timeout=0)
        gc.collect()


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), float("inf"), 7e9, 1e10])
@pytest.mark.parametrize("kind", KINDS)
def test_a_timeout_that_grpc_would_not_keep_is_refused(kind: Callable[..., Any], wrong: float) -> None:
    with pytest.raises(ValueError, match=r"a timeout is a number of seconds above 0, 1e\+09 at most"):
        kind("localhost", timeout=wrong)


def test_the_longest_timeout_is_kept(connect: Connect, server_address: str, digits: list[GreyImage]) -> None:
    twin = connect(server_address, timeout=1e9)
    assert twin.classify(digits[7]).digit == 7
    assert len(list(twin.stream_classify(digits))) == 20
    twin.wait_ready(1e9)


# Event loops ----------------------------------------------------------------------


def test_an_async_client_of_another_event_loop_says_so(fakes: Fakes, digits: list[GreyImage]) -> None:
    twin = client.AsyncClient(fakes.serve())

    async def close() -> None:
        await twin.close()

    async def main() -> None:
        assert (await twin.classify(digits[7])).digit == 7
        await asyncio.to_thread(elsewhere)
        assert (await twin.classify(digits[7])).digit == 7

    def elsewhere() -> None:
        calls: list[Callable[[], Any]] = [
            lambda: twin.classify(digits[7]),
            lambda: twin.classify_batch(digits),
            twin.get_model,
            twin.is_serving,
            twin.wait_ready,
            close,
        ]
        for call in calls:
            with pytest.raises(RuntimeError, match="belongs to the event loop of its first call, and this is another"):
                asyncio.run(call())

    asyncio.run(main())
    with pytest.raises(RuntimeError, match="belongs to the event loop of its first call, and this is another"):
        asyncio.run(twin.classify(digits[7]))
    asyncio.run(close())  # its own loop is gone, and its connections with it
    with pytest.raises(RuntimeError, match="the client is closed"):
        asyncio.run(twin.get_model())
