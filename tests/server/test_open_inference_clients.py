"""Unmodified clients of the Open Inference Protocol, each in a process and an environment of its own.

`scripts/open-inference-clients` makes the environments and names their
interpreters in variables; without these the tests are skipped.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from digits.checkpoint import load_checkpoint
from digits.preprocessing import normalize
from server.inference import Classifier
from server.settings import EMBEDDED_WEIGHTS

Start = Callable[..., tuple[str, subprocess.Popen[str]]]

PROGRAMS = Path(__file__).parent / "open_inference"
TIMEOUT = 100


@pytest.fixture(params=["triton", "kserve"])
def client(request: pytest.FixtureRequest) -> list[str]:
    """The command that runs a client's program."""
    variable = f"MNIST_GRPC_{request.param.upper()}_PYTHON"
    if not (python := os.environ.get(variable)):
        pytest.skip(f"{variable} names no interpreter: scripts/open-inference-clients makes one and runs these tests")
    return [python, str(PROGRAMS / f"{request.param}_client.py")]


def classify(client: list[str], address: str, pixels: npt.NDArray[np.uint8], labels: list[int], folder: Path) -> None:
    """Have a client classify digits and compare each answer with the model's own; the model reads most of them."""
    classifier = Classifier(load_checkpoint(EMBEDDED_WEIGHTS))
    manifest, scores = classifier.checkpoint.manifest, classifier.predict(pixels)
    assert (scores.digits == labels).mean() >= 0.9
    np.savez(
        folder / "digits.npz",
        pixels=pixels,
        features=normalize(pixels, manifest.mean, manifest.std),
        probabilities=scores.probabilities,
        logits=scores.logits,
        version=np.array(scores.model_version),
    )
    ended = subprocess.run(
        [*client, address, str(folder / "digits.npz")], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"{len(pixels)} digits")


def test_a_client_made_elsewhere_classifies_the_golden_digits(
    client: list[str],
    each_transport: str,
    server_process: Start,
    golden: tuple[npt.NDArray[np.uint8], list[int]],
    tmp_path: Path,
) -> None:
    address, _ = server_process("--transport", each_transport)
    classify(client, address, *golden, tmp_path)


def test_a_client_made_elsewhere_classifies_a_thousand_digits_of_mnist(
    client: list[str],
    each_transport: str,
    server_process: Start,
    mnist_test: tuple[npt.NDArray[np.uint8], list[int]],
    tmp_path: Path,
) -> None:
    address, _ = server_process("--transport", each_transport)
    images, labels = mnist_test
    classify(client, address, images[:1000].reshape(-1, 784), labels[:1000], tmp_path)
