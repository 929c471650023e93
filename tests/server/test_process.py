"""The real process: what it prints, how it ends, and what it says when it cannot serve."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
import torch

from digits.checkpoint import Manifest, save_checkpoint
from digits.network import ImprovedNN
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1 import digit_classifier_pb2_grpc as pb_grpc

Start = Callable[..., tuple[str, subprocess.Popen[str]]]
Golden = tuple[npt.NDArray[np.uint8], list[int]]

ROOT = Path(__file__).parents[2]
TIMEOUT = 40


def end_of(process: subprocess.Popen[str], timeout: float = TIMEOUT) -> tuple[int, str, str]:
    """Wait for the process's end; its exit code, and what is left of stdout and stderr."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def classifier_at(channel: grpc.aio.Channel) -> Any:
    return pb_grpc.DigitClassifierStub(channel)


def check_one_line(err: str, *words: str) -> None:
    """The last line of stderr says it all, and there is no traceback."""
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith("mnist-grpc-server: ")
    for word in words:
        assert word in line


# Serving and stopping -----------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_finishes_accepted_calls_ends_streams_and_exits_with_0(
    number: signal.Signals, server_process: Start, golden: Golden
) -> None:
    address, process = server_process("--max-wait-ms", "700", "--grace", "60")
    assert address.startswith("127.0.0.1:")
    async with grpc.aio.insecure_channel(address) as channel:
        classifier = classifier_at(channel)
        stream = classifier.StreamClassify(timeout=TIMEOUT)
        await stream.write(pb.StreamClassifyRequest(first_sequence=1, frames=pb.ClassifyRequest(pixels=bytes(784))))
        assert (await stream.read()).blocks[0].first_sequence == 1
        call = classifier.Classify(pb.ClassifyRequest(pixels=golden[0].tobytes()), timeout=TIMEOUT)
        for _ in range(5):  # when later calls are answered, the one before has arrived, and waits in the window
            await classifier.GetModel(pb.GetModelRequest(), timeout=TIMEOUT)
        assert not call.done()
        process.send_signal(number)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stream.read()
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        response = await call
        assert sum(map(int.__eq__, response.digits, golden[1])) >= 18
    code, out, err = end_of(process)
    assert (code, out) == (0, ""), "`serving on` is the only line"
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].endswith("stopped")


def test_a_signal_while_the_weights_are_read_ends_the_server_promptly(server_process: Start, tmp_path: Path) -> None:
    weights = tmp_path / "mnist_model.pth"
    os.mkfifo(weights)
    _, process = server_process("--weights", str(weights), wait=False)
    with weights.open("wb"):  # open as soon as the server reads, which then waits for us
        process.send_signal(signal.SIGTERM)
        code, out, err = end_of(process, timeout=25)
    assert (code, out) == (0, "")
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_server_listens_ends_it_in_order(number: signal.Signals, server_process: Start) -> None:
    _, process = server_process(wait=False)
    assert process.stderr is not None
    assert "starting with" in process.stderr.readline()
    process.send_signal(number)
    code, out, err = end_of(process)
    assert (code, out) == (0, "")
    assert "Traceback" not in err


def test_the_line_that_tells_an_ipv6_address_can_be_used_as_one(server_process: Start) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    address, _ = server_process("--host", "::1")
    assert address.startswith("[::1]:")
    with grpc.insecure_channel(address) as channel:
        stub: Any = pb_grpc.DigitClassifierStub(channel)
        assert stub.GetModel(pb.GetModelRequest(), timeout=TIMEOUT).name == "mnist"


# Settings ---------------------------------------------------------------------------


def test_the_environment_is_read_and_json_logs_are_json(server_process: Start) -> None:
    address, process = server_process(
        "--max-wait-ms", "1", MNIST_GRPC_LOG_FORMAT="json", MNIST_GRPC_MAX_BATCH_SIZE="7", MNIST_GRPC_MAX_WAIT_MS="x"
    )
    with grpc.insecure_channel(address) as channel:
        stub: Any = pb_grpc.DigitClassifierStub(channel)
        assert stub.GetModel(pb.GetModelRequest(), timeout=TIMEOUT).max_batch_size == 7
    process.send_signal(signal.SIGTERM)
    code, _, err = end_of(process)
    assert code == 0
    entries = [json.loads(line) for line in err.splitlines()]
    assert all({"time", "level", "logger", "message"} <= entry.keys() for entry in entries)
    assert "max_batch_size=7 (environment)" in entries[0]["message"]
    assert "max_wait_ms=1.0 (flag)" in entries[0]["message"]
    assert entries[-1]["message"] == "stopped"


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        (["--port", "65536"], {}, ["--port", "from 0 to 65535", "65536"]),
        (["--max-batch-size", "many"], {}, ["--max-batch-size", "a whole number", "'many'"]),
        ([], {"MNIST_GRPC_GRACE": "long"}, ["MNIST_GRPC_GRACE", "a number", "'long'"]),
        (["--model", "cnn", "--weights", "my.pth"], {}, ["--model", "--weights", "not given together", "'my.pth'"]),
    ],
)
def test_a_bad_setting_exits_with_2_and_one_line(
    flags: list[str], environment: dict[str, str], words: list[str], server_process: Start
) -> None:
    _, process = server_process(*flags, wait=False, **environment)
    code, out, err = end_of(process)
    assert (code, out) == (2, "")
    check_one_line(err, *words)
    assert len(err.strip().splitlines()) == 1


def test_an_unknown_flag_exits_with_2(server_process: Start) -> None:
    _, process = server_process("--prot", "1", wait=False)
    code, out, err = end_of(process)
    assert (code, out) == (2, "")
    assert "--prot" in err
    assert "Traceback" not in err


# What cannot be served ----------------------------------------------------------------


def test_a_second_server_on_a_port_exits_with_1_and_says_why(server_process: Start) -> None:
    address, _ = server_process()
    _, process = server_process("--port", address.split(":")[1], wait=False)
    code, out, err = end_of(process)
    assert (code, out) == (1, "")
    check_one_line(err, address, "taken")


@pytest.mark.parametrize("kind", ["missing", "corrupt", "untrained"])
def test_weights_that_cannot_be_served_exit_with_1_and_say_why(
    kind: str, server_process: Start, tmp_path: Path
) -> None:
    weights = tmp_path / "mnist_model.pth"
    if kind == "corrupt":
        weights.write_bytes(b"no weights")
    elif kind == "untrained":
        torch.manual_seed(0)
        save_checkpoint(weights, ImprovedNN(), Manifest())
    _, process = server_process("--weights", str(weights), wait=False)
    code, out, err = end_of(process)
    assert (code, out) == (1, "")
    words = {"missing": "cannot be read", "corrupt": "state dict", "untrained": "golden digits"}
    check_one_line(err, str(weights), words[kind])


def test_without_torch_the_server_says_what_to_install(server_process: Start, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(name='torch')")
    _, process = server_process(wait=False, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    code, out, err = end_of(process)
    assert (code, out) == (1, "")
    check_one_line(err, "torch is not installed", "mnist-grpc[server]")


def test_importing_the_server_loads_no_torch_and_no_grpc(tmp_path: Path) -> None:
    """So that a bad setting is told at once, and `--help` too."""
    code = "import server, server.cli, sys; print(sorted({'torch', 'grpc'} & sys.modules.keys()))"
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT,
    ).stdout
    assert out == "[]\n"
