"""New weights in a running process: by the file, by a signal, by ModelAdmin; and back again."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
import torch

from digits.checkpoint import Manifest, load_checkpoint, save_checkpoint
from digits.network import ImprovedNN
from digits.snapshot import manifest_path
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1 import digit_classifier_pb2_grpc as pb_grpc
from protos.mnist.v1 import model_admin_pb2 as admin_pb
from protos.mnist.v1 import model_admin_pb2_grpc as admin_pb_grpc
from server.settings import EMBEDDED_WEIGHTS

Start = Callable[..., tuple[str, subprocess.Popen[str]]]
Golden = tuple[npt.NDArray[np.uint8], list[int]]

TIMEOUT = 40


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A copy of the embedded weights and their manifest."""
    path = tmp_path / "mnist_model.pth"
    shutil.copy(EMBEDDED_WEIGHTS, path)
    shutil.copy(manifest_path(EMBEDDED_WEIGHTS), manifest_path(path))
    return path


def write_variant(path: Path, seed: int) -> str:
    """Replace weights by slightly different ones; return their version."""
    checkpoint = load_checkpoint(EMBEDDED_WEIGHTS)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in checkpoint.network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-4)
    return save_checkpoint(path, checkpoint.network, checkpoint.manifest)[:12]


def version_at(channel: grpc.Channel) -> str:
    stub: Any = pb_grpc.DigitClassifierStub(channel)
    version: str = stub.GetModel(pb.GetModelRequest(), timeout=TIMEOUT).version
    return version


def next_log_line(process: subprocess.Popen[str], *words: str) -> str:
    """Wait for a line of the log that holds all these words."""
    assert process.stderr is not None
    for line in process.stderr:
        if all(word in line for word in words):
            return line
    pytest.fail(f"the log ended without {words}")


def test_a_file_that_is_replaced_is_served_and_a_bad_one_is_not(
    weights: Path, server_process: Start, golden: Golden
) -> None:
    address, process = server_process("--weights", str(weights), "--reload-interval", "0.05")
    with grpc.insecure_channel(address) as channel:
        stub: Any = pb_grpc.DigitClassifierStub(channel)
        first = version_at(channel)
        new = write_variant(weights, 1)
        next_log_line(process, "serves in place of", new)
        response = stub.Classify(pb.ClassifyRequest(pixels=golden[0].tobytes()), timeout=TIMEOUT)
        assert response.receipt.model_version == new != first
        weights.write_bytes(b"rubbish")
        next_log_line(process, "ERROR", "refused", f"version {new} goes on serving", str(weights))
        save_checkpoint(weights, ImprovedNN(), Manifest())
        next_log_line(process, "ERROR", "refused", "golden digits")
        assert version_at(channel) == new
        newer = write_variant(weights, 2)
        next_log_line(process, "serves in place of", newer)
        assert version_at(channel) == newer


def test_a_hangup_signal_reads_the_weights_again(weights: Path, server_process: Start) -> None:
    address, process = server_process("--weights", str(weights), "--reload-interval", "0")
    with grpc.insecure_channel(address) as channel:
        first = version_at(channel)
        new = write_variant(weights, 1)
        assert version_at(channel) == first, "nobody looks at the file"
        process.send_signal(signal.SIGHUP)
        next_log_line(process, "serves in place of", new)
        assert version_at(channel) == new
        process.send_signal(signal.SIGHUP)
        next_log_line(process, "those that are served", new)


def test_model_admin_reloads_rolls_back_and_says_why_not(weights: Path, server_process: Start) -> None:
    address, _ = server_process("--weights", str(weights), "--reload-interval", "0", "--admin", "--min-accuracy", "0.9")
    with grpc.insecure_channel(address) as channel:
        admin: Any = admin_pb_grpc.ModelAdminStub(channel)
        first = version_at(channel)
        with pytest.raises(grpc.RpcError) as refused:
            admin.Rollback(admin_pb.RollbackRequest(), timeout=TIMEOUT)
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        new = write_variant(weights, 1)
        served = admin.Reload(admin_pb.ReloadRequest(), timeout=TIMEOUT)
        assert (served.version, served.previous_version) == (new, first)
        assert version_at(channel) == new
        back = admin.Rollback(admin_pb.RollbackRequest(), timeout=TIMEOUT)
        assert (back.version, back.previous_version) == (first, new)
        assert version_at(channel) == first
        checkpoint = load_checkpoint(EMBEDDED_WEIGHTS)
        save_checkpoint(weights, checkpoint.network, Manifest(test_accuracy=0.5))
        with pytest.raises(grpc.RpcError) as refused:
            admin.Reload(admin_pb.ReloadRequest(), timeout=TIMEOUT)
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "at least 0.9, not 0.5" in (refused.value.details() or "")
        assert version_at(channel) == first


def test_without_the_flag_there_is_no_model_admin(server_process: Start) -> None:
    address, _ = server_process()
    with grpc.insecure_channel(address) as channel:
        admin: Any = admin_pb_grpc.ModelAdminStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            admin.Reload(admin_pb.ReloadRequest(), timeout=TIMEOUT)
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_request_split_over_batches_is_never_answered_by_two_models(
    weights: Path, server_process: Start, golden: Golden
) -> None:
    """Answers are compared with what the model of their receipt says, bit for bit up to rounding."""
    address, process = server_process(
        "--weights", str(weights), "--reload-interval", "0", "--admin", "--max-batch-size", "8"
    )
    rows = np.tile(golden[0], (10, 1))
    expected: dict[str, npt.NDArray[np.float32]] = {}
    with grpc.insecure_channel(address) as channel:
        stub: Any = pb_grpc.DigitClassifierStub(channel)
        admin: Any = admin_pb_grpc.ModelAdminStub(channel)
        request = pb.ClassifyRequest(pixels=rows.tobytes(), include_logits=True)
        for seed in range(6):
            version = write_variant(weights, seed)
            scaled = (torch.from_numpy(rows).float() / 255 - 0.5) / 0.5
            with torch.inference_mode():
                expected[version] = load_checkpoint(weights).network(scaled).numpy()
            calls = [stub.Classify.future(request, timeout=TIMEOUT) for _ in range(8)]
            assert admin.Reload(admin_pb.ReloadRequest(), timeout=TIMEOUT).version == version
            calls += [stub.Classify.future(request, timeout=TIMEOUT) for _ in range(2)]
            for call in calls:
                response = call.result()
                if (told := response.receipt.model_version) in expected:
                    given = np.array(response.logits, np.float32).reshape(-1, 10)
                    np.testing.assert_allclose(given, expected[told], rtol=1e-4, atol=1e-4)
                else:
                    assert seed == 0, "only before the first reload another version serves"
            assert calls[-1].result().receipt.model_version == version
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT) == 0
