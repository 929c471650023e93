"""Clients of other makers, unmodified, against both transports: Node's gRPC client, and h2load.

`scripts/foreign-clients` installs what Node needs and runs these tests; where a
tool is missing they are skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from google.rpc import error_details_pb2, status_pb2

from protos.mnist.v1 import digit_classifier_pb2 as pb
from server.service import CLASSIFY
from tests.server.test_credentials import Authority

Golden = tuple[npt.NDArray[np.uint8], list[int]]
Start = Callable[..., tuple[str, subprocess.Popen[str]]]
Node = Callable[..., Any]

CLIENT = Path(__file__).parent / "foreign" / "client.js"
TIMEOUT = 100


# Node ---------------------------------------------------------------------------------------


@pytest.fixture
def node(golden: Golden, tmp_path: Path) -> Node:
    """Run a scenario of the client on the golden digits: `node(address, scenario)` gives what it prints."""
    modules = os.environ.get("MNIST_GRPC_NODE_MODULES")
    if not modules:
        pytest.skip("MNIST_GRPC_NODE_MODULES names no packages: scripts/foreign-clients installs them and runs this")
    digits = tmp_path / "digits"
    digits.write_bytes(golden[0].tobytes())

    def run(address: str, scenario: str, *more: str) -> Any:
        ended = subprocess.run(
            ["node", str(CLIENT), address, scenario, str(digits), *more],
            env=os.environ | {"NODE_PATH": modules},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    return run


def check_digits(answer: Any, labels: list[int]) -> None:
    """An answer reads nearly all digits as people do."""
    assert len(answer["digits"]) == len(labels)
    assert sum(map(int.__eq__, answer["digits"], labels)) >= 0.9 * len(labels)
    probabilities = np.array(answer["probabilities"]).reshape(-1, 10)
    assert probabilities.argmax(axis=1).tolist() == answer["digits"]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-4)


def check_unary(told: Any, labels: list[int]) -> None:
    check_digits(told["together"], labels)
    assert np.array(told["together"]["logits"]).reshape(-1, 10).argmax(axis=1).tolist() == told["together"]["digits"]
    assert [answer["digits"] for answer in told["alone"]] == [[digit] for digit in told["together"]["digits"]]
    assert told["model"]["name"] == "mnist"
    assert told["together"]["receipt"]["modelVersion"] == told["model"]["version"]


def test_node_has_digits_read_one_by_one_and_together(
    each_transport: str, server_process: Start, node: Node, golden: Golden
) -> None:
    address, _ = server_process("--transport", each_transport)
    check_unary(node(address, "unary"), golden[1])


def test_node_talks_over_tls(
    each_transport: str, server_process: Start, node: Node, golden: Golden, tmp_path: Path
) -> None:
    authority = Authority("ours")
    pair = authority.issue(tmp_path / "server")
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    address, _ = server_process("--transport", each_transport, *pair.flags())
    check_unary(node(address, "unary", str(tmp_path / "ca.pem")), golden[1])


def test_node_streams_frames_and_gets_their_answers_in_order(
    each_transport: str, server_process: Start, node: Node, golden: Golden
) -> None:
    address, _ = server_process("--transport", each_transport)
    told = node(address, "stream")
    assert told["status"]["code"] == "OK"
    answers: list[int | str] = []
    for block in told["blocks"]:
        assert block["firstSequence"] == len(answers)
        if block["outcome"] == "error":
            answers += [block["error"]["field"]] * block["frameCount"]
        else:
            assert len(block["result"]["digits"]) == block["frameCount"]
            answers += block["result"]["digits"]
    assert len(answers) == told["frames"] == 500
    assert [number for number, answer in enumerate(answers) if answer == "pixels"] == [99, 199, 299, 399, 499]
    labels = golden[1] * 25
    assert sum(answer == label for answer, label in zip(answers, labels, strict=True)) >= 0.9 * 495


def test_node_is_told_when_the_deadline_of_a_stream_has_passed(
    each_transport: str, server_process: Start, node: Node
) -> None:
    address, _ = server_process("--transport", each_transport)
    told = node(address, "deadline")
    assert [told[who]["code"] for who in ("client", "server")] == ["DEADLINE_EXCEEDED"] * 2
    assert len(told["after"]["digits"]) == 1


def test_a_stream_that_node_cancels_ends_as_cancelled_and_its_neighbours_are_answered(
    each_transport: str, server_process: Start, node: Node, golden: Golden
) -> None:
    address, process = server_process(
        *("--transport", each_transport, "--log-format", "json", "--log-level", "debug"),
        *("--max-batch-size", str(len(golden[1])), "--max-wait-ms", "60000"),
    )
    told = node(address, "cancel")
    assert told["left"]["code"] == "CANCELLED"
    assert told["stays"]["status"]["code"] == "OK"
    (block,) = told["stays"]["blocks"]
    assert block["firstSequence"] == 1
    check_digits(block["result"], golden[1])
    check_digits(told["call"], golden[1])
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=TIMEOUT)
    codes = {entry["request_id"]: entry["code"] for line in log.splitlines() if "code" in (entry := json.loads(line))}
    assert (codes["leaves"], codes["stays"]) == ("CANCELLED", "OK")


def test_node_reads_all_of_an_error(each_transport: str, server_process: Start, node: Node) -> None:
    address, _ = server_process("--transport", each_transport)
    told = node(address, "errors")
    for which in ("named", "unnamed"):
        error = told[which]
        assert error["code"] == "INVALID_ARGUMENT"
        assert "783" in error["details"]
        (binary,) = error["metadata"]["grpc-status-details-bin"]
        status = status_pb2.Status.FromString(bytes(binary["data"]))
        assert (status.code, status.message) == (3, error["details"])
        bad = error_details_pb2.BadRequest()
        assert status.details[0].Unpack(bad)
        assert bad.field_violations[0].field == "pixels"
    assert told["named"]["metadata"]["x-request-id"] == ["of Node"]
    (number,) = told["unnamed"]["metadata"]["x-request-id"]
    assert re.fullmatch("[0-9a-f]{16}", number)
    assert told["foreign"]["code"] == "NOT_FOUND"
    assert "'50 % größer, 数字 ✓'" in told["foreign"]["details"]
    assert told["unknown"]["code"] == "UNIMPLEMENTED"


def test_node_sends_messages_larger_than_a_window_up_to_the_limit(
    each_transport: str, server_process: Start, node: Node, golden: Golden
) -> None:
    address, _ = server_process("--transport", each_transport)
    told = node(address, "large")
    check_digits(told["fits"], (golden[1] * 201)[: 3 * 2**20 // 784])
    assert told["tooLarge"]["code"] == "RESOURCE_EXHAUSTED"
    assert "larger than max" in told["tooLarge"]["details"]
    assert len(told["after"]["digits"]) == 1, "its connection goes on"


def test_node_compresses_its_requests(each_transport: str, server_process: Start, node: Node, golden: Golden) -> None:
    address, _ = server_process("--transport", each_transport)
    told = node(address, "gzip")
    for answer in told["answers"]:
        check_digits(answer, golden[1] * 50)
    # By grpcio, which names the encodings with spaces between, Node finds that no other call should be compressed.
    of_one = 1000 * 784
    assert told["bytes"] < (of_one // 4 if each_transport == "asgi" else of_one + of_one // 4)


# h2load -------------------------------------------------------------------------------------


def test_h2load_is_answered_by_every_call(
    each_transport: str, server_process: Start, golden: Golden, tmp_path: Path
) -> None:
    if shutil.which("h2load") is None:
        pytest.skip("h2load is missing; Debian's package is nghttp2-client")
    message = pb.ClassifyRequest(pixels=golden[0][7].tobytes()).SerializeToString()
    (tmp_path / "body").write_bytes(struct.pack(">BI", 0, len(message)) + message)
    address, process = server_process("--transport", each_transport, "--metrics-port", "0")
    assert process.stderr is not None
    # The line comes before `serving on`, which has been read.
    page = next(found[0] for line in process.stderr if (found := re.search(r"http://\S+/metrics", line)))
    calls = 3000
    size = ["-n", str(calls), "-c", "5", "-m", "20"]
    headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
    ended = subprocess.run(
        ["h2load", *size, *headers, "-d", str(tmp_path / "body"), f"http://{address}/{CLASSIFY}"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    told = ended.stdout
    done = f"{calls} total, {calls} started, {calls} done, {calls} succeeded, 0 failed, 0 errored, 0 timeout"
    assert f"requests: {done}" in told, told
    assert f"status codes: {calls} 2xx, 0 3xx, 0 4xx, 0 5xx" in told, told
    with urllib.request.urlopen(page, timeout=TIMEOUT) as response:
        counted = re.findall(r"^mnist_grpc_calls_total\{(.*)\} (.*)$", response.read().decode(), re.MULTILINE)
    # An error of gRPC is a 200 of HTTP, too.
    assert [series for series in counted if float(series[1])] == [(f'code="OK",method="{CLASSIFY}"', f"{calls}.0")]
