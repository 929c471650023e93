"""The parts together: real digits through the real server, and the origin's code beside it."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

import client
from digits.checkpoint import manifest_path
from digits.preprocessing import normalize
from server.settings import EMBEDDED_WEIGHTS

Images = npt.NDArray[np.uint8]
StartServer = Callable[..., tuple[str, subprocess.Popen[str]]]


GOOD_SHARE = 0.92
"""Of digits 8 pixels high, from other people and another scanner than MNIST's, 93.7 % are read."""


class OriginsNetwork(nn.Module):
    """The network as the origin's own code has it: plain PyTorch, nothing of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 256)
        self.fc2 = nn.Linear(256, 128)
        self.fc3 = nn.Linear(128, 10)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(x.size(0), -1)
        x = self.dropout(torch.relu(self.fc1(x)))
        x = torch.relu(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


def origins_answers(weights: str, images: Images) -> list[int]:
    """What the origin's code says: its class, `load_state_dict`, its transform, argmax."""
    network = OriginsNetwork()
    network.load_state_dict(torch.load(weights))
    network.eval()
    scaled = torch.from_numpy(images.astype(np.float32)).div(255)  # ToTensor
    with torch.no_grad():
        answers: list[int] = network((scaled - 0.5) / 0.5).argmax(dim=1).tolist()
    return answers


@pytest.fixture
def handwritten() -> tuple[list[Images], list[int]]:
    """1,797 digits that people wrote (UCI), 8x8, bright ink on black, and what they show."""
    data = load_digits()
    return [np.rint(image * 255 / 16).astype(np.uint8) for image in data.images], data.target.tolist()


def share_right(predictions: list[client.Prediction], labels: list[int]) -> float:
    return sum(p.digit == label for p, label in zip(predictions, labels, strict=True)) / len(labels)


def test_the_manifest_belongs_to_the_embedded_weights() -> None:
    manifest = json.loads(manifest_path(EMBEDDED_WEIGHTS).read_text())
    assert manifest["sha256"] == hashlib.sha256(Path(EMBEDDED_WEIGHTS).read_bytes()).hexdigest()
    assert manifest["dataset"] == "MNIST"
    assert manifest["test_accuracy"] >= 0.984
    assert manifest["training"]["images"]["test"] == 10_000


def test_digits_written_by_people_are_read_by_the_running_server(
    server_process: StartServer, handwritten: tuple[list[Images], list[int]]
) -> None:
    images, labels = handwritten
    address, _ = server_process()
    with client.Client(address) as digits:
        assert share_right(digits.classify_batch(images), labels) >= GOOD_SHARE
        # The same people's digits as pictures: dark ink on light paper, larger, off-centre.
        sample = range(0, len(images), 9)
        pictures = []
        for index in sample:
            page = Image.new("L", (200, 160), 250)
            page.paste(Image.fromarray(255 - images[index]).resize((96, 96), Image.Resampling.BICUBIC), (70, 20))
            pictures.append(page)
        assert share_right(digits.classify_batch(pictures), [labels[index] for index in sample]) >= GOOD_SHARE


def test_the_origins_code_runs_on_our_weights_and_answers_as_the_server_does(
    server_process: StartServer, mnist_test: tuple[Images, list[int]]
) -> None:
    images, labels = mnist_test
    address, _ = server_process()
    with client.Client(address) as digits:
        predictions = digits.classify_batch(images)
        served = [p.digit for p in predictions]
        assert served == origins_answers(EMBEDDED_WEIGHTS, images)
        # To the digit what the trainer's evaluation found.
        manifest = json.loads(manifest_path(EMBEDDED_WEIGHTS).read_text())
        assert share_right(predictions, labels) == manifest["test_accuracy"]
        assert digits.get_model().test_accuracy == pytest.approx(manifest["test_accuracy"])


def test_weights_that_the_origins_code_saved_are_served(
    server_process: StartServer, tmp_path: Path, handwritten: tuple[list[Images], list[int]]
) -> None:
    network = OriginsNetwork()
    network.load_state_dict(torch.load(EMBEDDED_WEIGHTS))
    with torch.no_grad():  # other weights than the embedded ones, with the same answers
        network.fc3.bias.add_(1)
    path = tmp_path / "mnist_model.pth"
    torch.save(network.state_dict(), path)
    address, _ = server_process("--weights", str(path))
    with client.Client(address) as digits:
        model = digits.get_model()
        assert model.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert model.test_accuracy is None
        assert share_right(digits.classify_batch(handwritten[0]), handwritten[1]) >= GOOD_SHARE


def test_pixels_and_features_of_the_same_image_get_the_same_answer(
    server_process: StartServer, golden: tuple[Images, list[int]]
) -> None:
    import grpc

    from protos.mnist.v1 import digit_classifier_pb2 as pb
    from protos.mnist.v1.digit_classifier_pb2_grpc import DigitClassifierStub

    pixels, labels = golden
    address, _ = server_process()
    with grpc.insecure_channel(address) as channel:
        stub = DigitClassifierStub(channel)
        of_pixels = stub.Classify(pb.ClassifyRequest(pixels=pixels.tobytes(), include_logits=True))
        of_features = stub.Classify(pb.ClassifyRequest(features=normalize(pixels).tobytes(), include_logits=True))
    assert list(of_pixels.digits) == list(of_features.digits) == labels
    # Up to rounding: of pixels, the first layer does the normalisation, too.
    np.testing.assert_allclose(of_pixels.logits, of_features.logits, rtol=1e-5, atol=1e-5)
