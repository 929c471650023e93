"""Logs: one record a line whatever it holds, with its fields, and never an image."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import enum
import io
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import numpy.typing as npt
import pytest

from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1 import digit_classifier_pb2_grpc as pb_grpc
from server import logs
from server.settings import Settings, environment_variable, flag, read_settings

Start = Callable[..., tuple[str, subprocess.Popen[str]]]
Golden = tuple[npt.NDArray[np.uint8], list[int]]
Log = Callable[..., str]

ROOT = Path(__file__).parents[2]
TIMEOUT = 40


@pytest.fixture
def log() -> Log:
    """Log one record in a format, and get what was written."""

    def write(form: str, message: str, *arguments: Any, worker: int | None = None, **options: Any) -> str:
        stream = io.StringIO()
        logger = logging.Logger("server.test_logs")  # has no parent, so that pytest does not keep what it cannot write
        logger.addHandler(logs.make_handler(Settings(log_format=form), stream, worker=worker))
        logger.warning(message, *arguments, **options)
        return stream.getvalue()

    return write


class Unwritable:
    """What nobody can make text of."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    __str__ = __repr__


class Colour(enum.Enum):
    RED = 1


# Formats -------------------------------------------------------------------------


def test_a_json_record_is_one_object_with_its_fields(log: Log) -> None:
    line = log("json", "weights %s", "replaced", worker=3, extra={"version": "abc", "seconds": 0.5, "code": None})
    assert line.endswith("\n")
    entry = json.loads(line)
    assert datetime.fromisoformat(entry.pop("time")).utcoffset() is not None
    assert entry == {
        "level": "warning",
        "logger": "server.test_logs",
        "message": "weights replaced",
        "worker": 3,
        "version": "abc",
        "seconds": 0.5,
        "code": None,
    }


def test_a_text_record_is_one_line_with_its_fields(log: Log) -> None:
    line = log("text", "weights %s", "replaced", worker=3, extra={"version": "abc", "seconds": 0.5, "code": None})
    time, rest = line.split(" ", 1)
    assert datetime.fromisoformat(time).utcoffset() is not None
    assert rest == "WARNING server.test_logs: weights replaced worker=3 version=abc seconds=0.5 code=null\n"


def test_fields_cannot_take_the_place_of_the_record_s_own(log: Log) -> None:
    entry = json.loads(log("json", "true", extra={"time": "never", "level": "fatal", "logger": "root"}))
    assert (entry["message"], entry["level"], entry["logger"]) == ("true", "warning", "server.test_logs")
    assert entry["time"] != "never"


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (bytes(range(256)), "<256 bytes>"),
        (bytearray(784), "<784 bytes>"),
        (memoryview(bytes(3)), "<3 bytes>"),
        (np.full((28, 28), 77, np.uint8), "<ndarray>"),
        (pb.ClassifyRequest(pixels=b"\x4d" * 784), "<ClassifyRequest>"),
        (Unwritable(), "<Unwritable>"),
        (ValueError(Unwritable()), "<ValueError>"),
        (Colour.RED, "RED"),
        (Path("/a/b"), "/a/b"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (-(1 << 64), "<int of 65 bits>"),
        pytest.param(1 << 80_000, "<int of 80001 bits>", id="huge"),
        ("x" * 5000, "x" * 2000 + "... (5000 characters)"),
    ],
)
def test_values_that_are_no_json_are_told_by_their_kind(form: str, value: object, expected: str, log: Log) -> None:
    line = log(form, "given", extra={"value": value})
    if form == "json":
        assert json.loads(line)["value"] == expected
    else:
        assert line.split(": given value=")[1].strip() in (expected, json.dumps(expected))


def test_nested_values_are_told_to_a_depth(log: Log) -> None:
    endless: list[Any] = [1, {"a": b"12", 2: (3, None)}]
    endless.append(endless)
    entry = json.loads(log("json", "given", extra={"value": endless}))
    assert entry["value"][:2] == [1, {"a": "<2 bytes>", "2": [3, None]}]
    assert "<list>" in json.dumps(entry)


def test_arguments_that_do_not_fit_their_message_lose_no_record(log: Log) -> None:
    assert "100 %, yes (its arguments do not fit" in log("text", "100 %, yes", "of what?")
    assert "not fit" in json.loads(log("json", "%d images", "many"))["message"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_traceback_is_with_its_record(form: str, log: Log) -> None:
    try:
        raise ValueError("first\n2030-01-01T00:00:00.000+00:00 INFO server.app: forged\r\x1b[2J")
    except ValueError:
        written = log(form, "it failed", exc_info=True)
    if form == "json":
        entry = json.loads(written)
        assert entry["traceback"].startswith("Traceback (most recent call last)")
        assert "ValueError: first" in entry["traceback"]
        assert written.count("\n") == 1
    else:
        head, *rest = written.splitlines()
        assert head.endswith("it failed")
        assert rest[0] == "  Traceback (most recent call last):"
        assert all(line.startswith("  ") for line in rest), "no line can be taken for a record"
    assert "\x1b" not in written
    assert "\r" not in written


HOSTILE = [
    "a\nINFO server.app: forged",
    "a\r\nb",
    "\x1b[31mred\x1b[0m",
    "a\x00b\x7f",
    "a\u2028b\u2029c\x85d",
    "a\u202eb",
    "\udcff",
    'a" code="OK',
    "a code=OK",
    "a b",
    "a=b",
    "a\\",
    "",
]


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_text_breaks_out_of_its_line_or_its_field(form: str, hostile: str, log: Log) -> None:
    written = log(form, "from %s", hostile, extra={"peer": hostile, hostile or "field": 1})
    assert written.endswith("\n")
    line = written[:-1]
    assert line.isprintable()
    assert len(written.splitlines()) == 1
    if form == "json":
        assert json.loads(line)["peer"] == hostile
    else:
        value = line.split(" peer=", 1)[1]
        if value.startswith('"'):
            value, _ = json.JSONDecoder().raw_decode(value)
            assert value == hostile
        else:
            assert value.split(" ", 1)[0] == hostile


# Request ids and calls -----------------------------------------------------------


@pytest.mark.parametrize("given", ["a", "7f3c-12", "with space", "x" * 128, "~!@"])
def test_a_caller_s_request_id_is_taken(given: str) -> None:
    assert logs.request_id((("other", "b"), ("x-request-id", given), ("x-request-id", "later"))) == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a\nb", "ü", "\x00", b"bytes", "\x7f"])
def test_a_request_id_that_breaks_the_rule_is_replaced(given: str | bytes) -> None:
    made = logs.request_id((("x-request-id", given),))
    assert made != given
    assert len(made) == 16
    assert made.isalnum()


def test_made_request_ids_differ() -> None:
    assert len({logs.request_id(None) for _ in range(1000)}) == 1000
    assert logs.request_id(()) != logs.request_id(())


def test_a_call_is_logged_at_its_level_with_its_fields(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "server.calls")
    logs.log_call(logging.DEBUG, "m", "OK", 0.1, "id", "peer")
    assert not caplog.records, "at info a call is worth no line"
    logs.log_call(logging.ERROR, "a.B/C", "INTERNAL", 0.1234567, "id-1", "ipv4:1.2.3.4:5", "100 % failed", "abc")
    (record,) = caplog.records
    fields = {"method": "a.B/C", "code": "INTERNAL", "seconds": 0.123457, "request_id": "id-1", "incident_id": "abc"}
    assert vars(record).items() >= (fields | {"peer": "ipv4:1.2.3.4:5"}).items()
    assert record.getMessage() == "100 % failed"
    caplog.set_level(logging.DEBUG, "server.calls")
    logs.log_call(logging.DEBUG, "a.B/C", "OK", 0.1, "id", "peer")
    assert caplog.records[-1].getMessage() == "call ended"
    assert "incident_id" not in vars(caplog.records[-1])


# The process ---------------------------------------------------------------------


CONFIGURED = """
import logging, sys, warnings
from server import logs
from server.settings import Settings
logs.configure(Settings(log_format="json", log_level=sys.argv[1]), worker=2)
logs.configure(Settings(log_format="json", log_level=sys.argv[1]), worker=2)
for name in ("server.app", "digits", "PIL.PngImagePlugin"):
    for level in ("debug", "info", "warning"):
        getattr(logging.getLogger(name), level)("%s", level)
warnings.warn("careful")
"""


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_the_level_is_for_our_loggers_and_libraries_tell_no_details(level: str) -> None:
    command = [sys.executable, "-c", CONFIGURED, level]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == ""
    entries = [json.loads(line) for line in result.stderr.splitlines()]
    levels = ["debug", "info", "warning", "error"]
    told = levels[levels.index(level) : 3]
    library = [name for name in told if name != "debug"]
    expected = [(name, each) for name in ("server.app", "digits") for each in told]
    expected += [("PIL.PngImagePlugin", each) for each in library]
    if library:
        expected.append(("py.warnings", "warning"))
    assert [(entry["logger"], entry["level"]) for entry in entries] == expected, "and each once"
    assert all(entry["worker"] == 2 for entry in entries)


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_start_line_tells_every_setting_and_its_source(form: str, server_process: Start, tmp_path: Path) -> None:
    missing = tmp_path / "missing\nforged.pth"
    flags = ["--weights", str(missing), "--log-format", form, "--workers", "1"]
    _, process = server_process(*flags, wait=False, MNIST_GRPC_MAX_WAIT_MS="3")
    _, err = process.communicate(timeout=TIMEOUT)
    (line,) = [line for line in err.splitlines() if "starting with" in line]
    message = json.loads(line)["message"] if form == "json" else line
    settings, _ = read_settings(["--port", "0", *flags, "--max-wait-ms", "3"], {})
    if transport := os.environ.get("MNIST_GRPC_TRANSPORT"):  # of the tests' --transport
        settings = dataclasses.replace(settings, transport=transport)
    chosen = {"port": "flag", "weights": "flag", "log_format": "flag", "workers": "flag", "max_wait_ms": "environment"}
    if transport:
        chosen["transport"] = "environment"
    for name in vars(settings):
        shown = str(getattr(settings, name))
        if form == "text":
            shown = shown.replace("\n", "\\n")
        assert f" {name}={shown} ({chosen.get(name, 'default')})" in message, (flag(name), environment_variable(name))


async def test_no_pixel_reaches_the_log(server_process: Start, golden: Golden, golden_files: list[bytes]) -> None:
    """Images in all three forms, good and bad, at debug level: neither their bytes nor their numbers are told."""
    marked = np.full((1, 784), 213, np.uint8)  # a byte that stands in a row nowhere else
    features = np.full((1, 784), 0.8162, "<f4")
    texts = [bytes([213] * 8), b"213, 213", b"213 213", b"\\xd5\\xd5", b"d5d5d5", b"0.8162", b"IHDR", b"\x89PNG"]
    texts += [base64.b64encode(content.tobytes())[30:50] for content in (marked, features)]
    requests = [
        pb.ClassifyRequest(pixels=marked.tobytes()),
        pb.ClassifyRequest(pixels=marked.tobytes()[1:]),
        pb.ClassifyRequest(features=features.tobytes()),
        pb.ClassifyRequest(features=np.append(features, np.float32("nan")).tobytes()[4:]),
        pb.ClassifyRequest(encoded=pb.EncodedImages(files=[golden_files[0]])),
        pb.ClassifyRequest(encoded=pb.EncodedImages(files=[golden_files[0][:60], marked.tobytes()])),
    ]
    address, process = server_process("--log-level", "debug", "--workers", "1")
    err = asyncio.create_task(asyncio.to_thread(process.stderr.read))  # type: ignore[union-attr]
    codes = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = pb_grpc.DigitClassifierStub(channel)
        for request in requests:
            try:
                await stub.Classify(request, timeout=TIMEOUT)
                codes.append("OK")
            except grpc.aio.AioRpcError as error:
                codes.append(error.code().name)
            stream = stub.StreamClassify(timeout=TIMEOUT)
            await stream.write(pb.StreamClassifyRequest(frames=request))
            await stream.done_writing()
            async for _ in stream:
                pass
        with pytest.raises(grpc.aio.AioRpcError):
            await cast(Any, channel).unary_unary("/mnist.v1.DigitClassifier/Classify")(
                marked.tobytes(), timeout=TIMEOUT
            )
    assert codes == ["OK", "INVALID_ARGUMENT"] * 3
    process.send_signal(signal.SIGTERM)
    log = (await err).encode()
    assert process.wait(TIMEOUT) == 0
    assert b"starting with" in log
    assert log.count(b"DigitClassifier/Classify") >= 6, "each call is told"
    assert [text for text in texts if text in log] == []


def test_a_log_that_nobody_can_read_any_more_stops_nothing() -> None:
    code = CONFIGURED + "\nprint('went on')"
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-c", code, "debug"], cwd=ROOT, stdout=subprocess.PIPE, stderr=writer, text=True
    )
    os.close(writer)
    assert result.stdout == "went on\n"
