"""Bearer tokens over the wire: who is refused, with what words, and a file that changes while the server runs."""

from __future__ import annotations

import hmac
import logging
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.mnist.v1 import digit_classifier_pb2 as pb
from server.app import build_server
from server.authentication import LOOK_SECONDS, MAX_TOKENS, REFUSAL, BearerTokens, interceptors
from server.errors import CannotServe
from server.observer import Observer
from server.settings import Settings

Start = Callable[..., tuple[str, subprocess.Popen[str]]]
Metadata = Sequence[tuple[str, str | bytes]]

TIMEOUT = 30
SERVICE = "mnist.v1.DigitClassifier"
FIRST, SECOND, THIRD = "first-0123456789abcdef", "second_0123456789ABCDEF==", "third.~+/0123456789"

CLOSED = {
    "Classify": (f"/{SERVICE}/Classify", "unary"),
    "GetModel": (f"/{SERVICE}/GetModel", "unary"),
    "StreamClassify": (f"/{SERVICE}/StreamClassify", "stream"),
    "reflection": ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "stream"),
    "open inference": ("/inference.GRPCInferenceService/ModelInfer", "unary"),
    "is it live": ("/inference.GRPCInferenceService/ServerLive", "unary"),
    "admin": ("/mnist.v1.ModelAdmin/Rollback", "unary"),
    "unknown method": (f"/{SERVICE}/Guess", "unary"),
    "unknown service": ("/chess.Player/Move", "stream"),
    "nearly health": ("/grpc.health.v1.HealthX/Check", "unary"),
    "health in another case": ("/grpc.health.v1.health/Check", "unary"),
    "health behind a prefix": ("/x/grpc.health.v1.Health/Check", "unary"),
}


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# of the camera\n{FIRST}\n\n  {SECOND}  \r\n{THIRD}", encoding="utf-8")
    path.chmod(0o600)
    return path


@asynccontextmanager
async def server_of(**settings: Any) -> AsyncIterator[str]:
    """Without a model: UNAVAILABLE says that a call got through."""
    digit_server, port = build_server(Settings(port=0, **settings))
    await digit_server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await digit_server.stop(grace=0)


@pytest.fixture
async def channel(token_file: Path) -> AsyncIterator[grpc.aio.Channel]:
    async with server_of(auth_token_file=str(token_file)) as address, grpc.aio.insecure_channel(address) as channel:
        yield channel


def bearer(token: str) -> Metadata:
    return (("authorization", f"Bearer {token}"),)


async def outcome(
    channel: grpc.aio.Channel, metadata: Metadata, path: str = f"/{SERVICE}/Classify", kind: str = "unary"
) -> tuple[grpc.StatusCode, str]:
    """How a call ends; that of a stream sends nothing and does not say that it will not."""
    unary: Any = channel.unary_unary(path)
    stream: Any = channel.stream_stream(path)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await (
            unary(b"", metadata=metadata, timeout=TIMEOUT)
            if kind == "unary"
            else stream(metadata=metadata, timeout=TIMEOUT).read()
        )
    return error.value.code(), error.value.details() or ""


UNAUTHENTICATED = (grpc.StatusCode.UNAUTHENTICATED, REFUSAL)
LET_IN = (grpc.StatusCode.UNAVAILABLE, "the model is not loaded yet")


# Who is let in --------------------------------------------------------------------------


def test_without_a_token_file_there_is_no_interceptor() -> None:
    assert interceptors(Settings(), Observer()) == []


@pytest.mark.parametrize("token", [FIRST, SECOND, THIRD])
async def test_each_token_of_the_file_lets_a_call_in(token: str, channel: grpc.aio.Channel) -> None:
    assert await outcome(channel, bearer(token)) == LET_IN
    assert await outcome(channel, bearer(token), f"/{SERVICE}/GetModel") == LET_IN
    stream = await outcome(channel, bearer(token), f"/{SERVICE}/StreamClassify", "stream")
    assert stream == LET_IN


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer "])
async def test_the_scheme_may_be_written_in_any_case(scheme: str, channel: grpc.aio.Channel) -> None:
    assert await outcome(channel, (("authorization", f"{scheme} {FIRST}"),)) == LET_IN


WRONG: dict[str, Metadata] = {
    "no metadata": (),
    "another key": (("token", FIRST), ("x-authorization", f"Bearer {FIRST}")),
    "an empty value": (("authorization", ""),),
    "the scheme alone": (("authorization", "Bearer"),),
    "no token": (("authorization", "Bearer "),),
    "no scheme": (("authorization", FIRST),),
    "another scheme": (("authorization", f"Basic {FIRST}"),),
    "the wrong token": bearer("wrong-0123456789abcdef"),
    "the beginning": bearer(FIRST[:-1]),
    "more than it": bearer(FIRST + "0"),
    "another case": bearer(FIRST.upper()),
    "two tokens in one": bearer(f"{FIRST} {SECOND}"),
    "a list": bearer(f"{FIRST}, {SECOND}"),
    "two headers": (*bearer(FIRST), *bearer(SECOND)),
    "a wrong and a right header": (*bearer("wrong-0123456789abcdef"), *bearer(FIRST)),
    "a comment": bearer("# of the camera"),
    "a very long one": bearer("x" * 8000),
}


@pytest.mark.parametrize("how", list(WRONG))
async def test_a_call_without_one_right_token_is_refused_and_not_told_what_was_wrong(
    how: str, channel: grpc.aio.Channel
) -> None:
    assert await outcome(channel, WRONG[how]) == UNAUTHENTICATED


@pytest.mark.parametrize("what", list(CLOSED))
async def test_everything_but_health_is_closed_be_it_known_or_not(what: str, channel: grpc.aio.Channel) -> None:
    path, kind = CLOSED[what]
    assert await outcome(channel, (), path, kind) == UNAUTHENTICATED
    assert await outcome(channel, bearer("wrong-0123456789abcdef"), path, kind) == UNAUTHENTICATED


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_with_a_token_an_unknown_method_is_unimplemented(kind: str, channel: grpc.aio.Channel) -> None:
    code, _ = await outcome(channel, bearer(FIRST), "/chess.Player/Move", kind)
    assert code == grpc.StatusCode.UNIMPLEMENTED


async def test_health_is_told_and_pushed_without_a_token(channel: grpc.aio.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    assert (await health.Check(request, timeout=TIMEOUT)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch = health.Watch(request, timeout=TIMEOUT)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()


async def test_a_call_is_refused_before_its_message_is_read(channel: grpc.aio.Channel) -> None:
    """A message that the server would refuse for its size, had it read it."""
    unary: Any = channel.unary_unary(f"/{SERVICE}/Classify")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await unary(bytes(20_000_000), timeout=TIMEOUT)
    assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("token", [FIRST, THIRD, "wrong-0123456789abcdef", ""])
async def test_a_token_is_compared_with_all_of_the_file_whichever_it_is(
    token: str, channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def counted(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return compare(left, right)

    monkeypatch.setattr("server.authentication.hmac.compare_digest", counted)
    await outcome(channel, bearer(token))
    assert compared == [(32, 32)] * 3


# The file -----------------------------------------------------------------------------------


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "holds no token"),
    "comments only": (b"# nothing\n\n   \n#more\n", "holds no token"),
    "a short token": (f"{FIRST}\n# short\nsecret-0123456\n".encode(), "on line 3 a token of 14 characters; 16 is the"),
    "a comment behind a token": (f"{FIRST} # secret\n".encode(), "on line 1 what is no token"),
    "a header line": (f"\nBearer {FIRST}\n".encode(), "on line 2 what is no token"),
    "letters of another kind": ("secretschl\u00fcssel-0123456789\n".encode(), "on line 1 what is no token"),
    "padding inside": (b"secret=0123456789abcdef\n", "on line 1 what is no token"),
    "no text": (b"\xff\xfesecret\0\x01", "is no UTF-8 text"),
    "too many": ("\n".join(f"secret-token-{n:08}" for n in range(MAX_TOKENS + 1)).encode(), "1000 is the most"),
    "a whole disk": (b"\n" * (1 << 21), "is longer than 1048576 bytes"),
}


@pytest.mark.parametrize("how", list(BAD_FILES))
def test_a_file_that_cannot_be_used_stops_the_start_and_no_token_is_told(how: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    content, words = BAD_FILES[how]
    path.write_bytes(content)
    with pytest.raises(CannotServe) as error:
        interceptors(Settings(auth_token_file=str(path)), Observer())
    message = str(error.value)
    assert message.startswith(f"the token file {path} ")
    assert words in message
    for secret in (FIRST, "secret"):
        assert secret not in message
    assert "\n" not in message


def test_a_file_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    with pytest.raises(CannotServe, match=r"the token file .*/tokens cannot be read: No such file"):
        interceptors(Settings(auth_token_file=str(path)), Observer())
    os.mkfifo(path)
    with pytest.raises(CannotServe, match=r"the token file .*/tokens is no regular file"):
        interceptors(Settings(auth_token_file=str(path)), Observer())


def test_the_process_ends_with_one_line_that_names_the_line_and_not_the_token(
    server_process: Start, tmp_path: Path
) -> None:
    path = tmp_path / "tokens"
    path.write_text("# a\nhunter2\n", encoding="utf-8")
    _, process = server_process("--auth-token-file", str(path), "--workers", "1", wait=False)
    out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out) == (1, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"mnist-grpc-server: the token file {path} has on line 2 a token of 7 characters")
    assert "Traceback" not in err
    assert "hunter2" not in err


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + FIRST.encode(),
        FIRST.encode() + b"\r\n",
        f"{SECOND}\r{FIRST}\r".encode(),
        "\n".join([*(f"other-token-{n:08}" for n in range(MAX_TOKENS - 1)), FIRST]).encode(),
    ],
    ids=["with a byte order mark", "of Windows", "of an old Mac", "long"],
)
async def test_files_of_all_editors_are_read(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(content)
    async with server_of(auth_token_file=str(path)) as address, grpc.aio.insecure_channel(address) as channel:
        assert await outcome(channel, bearer(FIRST)) == LET_IN


# A file that changes -----------------------------------------------------------------------------


def call_with(token: str) -> Any:
    class Call(grpc.HandlerCallDetails):
        method = f"/{SERVICE}/Classify"
        invocation_metadata = tuple(bearer(token))

    return Call()


class Clock:
    """Time that passes when it is told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_changed_file_is_seen_at_the_first_call_a_second_later_and_not_looked_at_before(token_file: Path) -> None:
    clock = Clock()
    tokens = BearerTokens(str(token_file), Observer(), clock=clock)
    token_file.write_text("fresh-0123456789abcdef", encoding="utf-8")
    clock.now += LOOK_SECONDS - 0.01
    assert tokens.accepts(call_with(FIRST))
    assert not tokens.accepts(call_with("fresh-0123456789abcdef"))
    clock.now += 0.01
    assert tokens.accepts(call_with("fresh-0123456789abcdef"))
    assert not tokens.accepts(call_with(FIRST))


@pytest.mark.parametrize("how", ["empty", "a short token", "no text", "a header line", "gone", "a folder"])
def test_a_broken_new_file_keeps_the_old_tokens_and_is_logged_once_without_a_token(
    how: str, token_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    tokens = BearerTokens(str(token_file), Observer(), clock=clock)
    if how in BAD_FILES:
        token_file.write_bytes(BAD_FILES[how][0])
    else:
        token_file.unlink()
        if how == "a folder":
            token_file.mkdir()
    for _ in range(3):
        clock.now += LOOK_SECONDS
        assert tokens.accepts(call_with(SECOND))
        assert not tokens.accepts(call_with("secret-0123456"))
    (entry,) = [entry for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert entry.levelname == "ERROR"
    assert entry.message.startswith(f"the token file {token_file} ")
    assert entry.message.endswith("what was read before stays in use")
    assert "secret" not in entry.message
    if how == "a folder":
        token_file.rmdir()
    token_file.write_text(THIRD, encoding="utf-8")
    clock.now += LOOK_SECONDS
    assert tokens.accepts(call_with(THIRD))
    assert not tokens.accepts(call_with(SECOND))


async def test_tokens_are_exchanged_without_a_restart_and_open_streams_go_on(
    server_process: Start, token_file: Path
) -> None:
    address, process = server_process("--auth-token-file", str(token_file), "--workers", "1")
    new = token_file.with_name("new")
    new.write_text("fresh-0123456789abcdef\n", encoding="utf-8")
    async with grpc.aio.insecure_channel(address) as channel:
        classify: Any = channel.unary_unary(
            f"/{SERVICE}/Classify",
            request_serializer=pb.ClassifyRequest.SerializeToString,
            response_deserializer=pb.ClassifyResponse.FromString,
        )
        stream_classify: Any = channel.stream_stream(
            f"/{SERVICE}/StreamClassify",
            request_serializer=pb.StreamClassifyRequest.SerializeToString,
            response_deserializer=pb.StreamClassifyResponse.FromString,
        )
        request = pb.ClassifyRequest(pixels=bytes(784))
        stream = stream_classify(metadata=bearer(FIRST), timeout=TIMEOUT)
        await stream.write(pb.StreamClassifyRequest(first_sequence=1, frames=request))
        assert (await stream.read()).blocks[0].first_sequence == 1
        assert len((await classify(request, metadata=bearer(FIRST), timeout=TIMEOUT)).digits) == 1
        assert await outcome(channel, bearer("fresh-0123456789abcdef")) == UNAUTHENTICATED
        os.replace(new, token_file)
        # The old one is good until the file is looked at again.
        while await (call := classify(request, metadata=bearer(FIRST), timeout=TIMEOUT)).code() == grpc.StatusCode.OK:
            pass
        assert (await call.code(), await call.details()) == UNAUTHENTICATED
        assert len((await classify(request, metadata=bearer("fresh-0123456789abcdef"), timeout=TIMEOUT)).digits) == 1
        await stream.write(pb.StreamClassifyRequest(first_sequence=2, frames=request))
        assert (await stream.read()).blocks[0].first_sequence == 2
        stream.cancel()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert FIRST not in err
    assert "fresh-0123456789abcdef" not in err
