"""A model of 26 classes from the data to the caller: learnt from files like EMNIST's, served, and exchanged."""

from __future__ import annotations

import asyncio
import http.client
import json
import queue
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw

import client
from client import cli
from digits.checkpoint import load_checkpoint, manifest_path
from digits.preprocessing import to_pixels
from digits.snapshot import take_snapshot
from protos.inference import grpc_inference_service_pb2 as inference_pb
from protos.inference import grpc_inference_service_pb2_grpc as inference_grpc
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1 import model_admin_pb2 as admin_pb
from protos.mnist.v1 import model_admin_pb2_grpc as admin_grpc
from server.inference import Scores, load_classifier
from server.settings import EMBEDDED_WEIGHTS
from trainer.cli import main
from trainer.outliers import font_of

Images = npt.NDArray[np.uint8]
StartServer = Callable[..., tuple[str, subprocess.Popen[str]]]

DIGITS = Path(EMBEDDED_WEIGHTS)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")
TIMEOUT = 40


def letter(text: str, font: str) -> Images:
    """Canonical pixels of a printed letter, `uint8[28, 28]`."""
    page = Image.new("L", (160, 160), 255)
    ImageDraw.Draw(page).text((40, 20), text, font=font_of(font, 100), fill=0)
    return to_pixels(page)


@pytest.fixture(scope="module")
def images() -> Images:
    """Each letter in each font, A to Z and again, `uint8[104, 28, 28]`."""
    return np.stack([letter(text, font) for font in FONTS for text in LETTERS])


def write_letters(folder: Path, images: Images) -> None:
    """The files of EMNIST's letters below a folder, as torchvision lays them out: columns first, classes from 1 on."""
    labels = (np.arange(len(images)) % 26 + 1).astype(np.uint8)
    raw = folder / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "test"):
        for name, array in (("images-idx3", images.transpose(0, 2, 1)), ("labels-idx1", labels)):
            header = struct.pack(f">{1 + array.ndim}i", 0x0800 + array.ndim, *array.shape)
            (raw / f"emnist-letters-{part}-{name}-ubyte").write_bytes(header + array.tobytes())


@dataclass
class Made:
    """A training that is over."""

    data: Path
    run: Path

    @property
    def weights(self) -> Path:
        return self.run / "mnist_model.pth"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, images: Images) -> Made:
    made = Made(tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("runs") / "letters")
    write_letters(made.data, images)
    flags = ["--dataset", "emnist-letters", "--data-dir", str(made.data), "--no-download", "--out", str(made.run)]
    flags += ["--teacher", "none", "--no-augment", "--damaged", "0", "--epochs", "30", "--batch-size", "13"]
    assert main([*flags, "--validation-size", "4", "--learning-rate", "0.05"]) == 0
    return made


def put(weights: Path, place: Path) -> None:
    """Weights and manifest where a server looks for them."""
    shutil.copy(weights, place)
    shutil.copy(manifest_path(weights), manifest_path(place))


# The trainer ------------------------------------------------------------------


def test_a_training_on_letters_gives_a_model_of_26_classes(made: Made) -> None:
    checkpoint = load_checkpoint(made.weights)
    manifest = checkpoint.manifest
    assert manifest.labels == tuple(LETTERS)
    assert (manifest.architecture, manifest.dataset, manifest.digit_threshold) == ("ImprovedNN", "EMNIST Letters", None)
    assert manifest.test_accuracy is not None
    assert manifest.test_accuracy > 0.9
    assert checkpoint.parameter_count == 235_146 + 16 * 129
    figures = json.loads((made.run / "metrics.json").read_text())["test"]
    assert np.shape(figures["confusion"]) == (26, 26)
    assert np.sum(figures["confusion"], axis=1).tolist() == [4] * 26
    assert len(figures["recall"]) == len(figures["precision"]) == 26
    table = (made.run / "report.html").read_text().partition("<pre>")[2].partition("</pre>")[0].splitlines()
    assert [line.split()[0] for line in table] == ["class", *LETTERS]


def test_letters_are_measured_on_the_data_that_their_manifest_names(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = ["evaluate", "--weights", str(made.weights), "--data-dir", str(made.data), "--no-download"]
    assert main([*evaluate, "--json", "--out", str(tmp_path / "out")]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["dataset"], np.shape(record["confusion"])) == ("EMNIST Letters", (26, 26))
    assert record["accuracy"] == load_checkpoint(made.weights).manifest.test_accuracy
    assert (tmp_path / "out" / "confusion.png").is_file()
    assert main([*evaluate, "--dataset", "sklearn"]) == 1
    assert "the classes of" in capsys.readouterr().err


def test_a_model_of_letters_teaches_letters(made: Made, tmp_path: Path) -> None:
    flags = ["--dataset", "emnist-letters", "--data-dir", str(made.data), "--no-download", "--epochs", "1"]
    flags += ["--teacher", str(made.weights), "--lessons", "1", "--validation-size", "4"]
    assert main([*flags, "--arch", "cnn", "--out", str(tmp_path / "pupil")]) == 0
    pupil = load_checkpoint(tmp_path / "pupil" / "mnist_model.pth").manifest
    assert (pupil.architecture, pupil.labels) == ("CNN", tuple(LETTERS))


def test_letters_do_not_take_the_place_of_digits(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = tmp_path / "served.pth"
    put(DIGITS, served)
    assert main(["promote", str(made.run), "--to", str(served)]) == 1
    assert "the classes of this model are A, B, C" in capsys.readouterr().err
    assert main(["promote", str(made.run), "--to", str(served), "--force"]) == 0
    assert load_checkpoint(served).manifest.labels == tuple(LETTERS)


def test_missing_letters_are_named_with_the_way_to_get_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dataset", "emnist-letters", "--data-dir", str(tmp_path), "--no-download"]
    assert main([*flags, "--out", str(tmp_path / "run")]) == 1
    told = capsys.readouterr().err
    assert "EMNIST Letters is not complete, and downloading is switched off (--no-download)" in told
    assert "emnist-letters-train-images-idx3-ubyte" in told
    assert not (tmp_path / "run").exists()


@pytest.fixture
def folder(tmp_path: Path, images: Images) -> Path:
    """Pictures of twelve letters, four of each, in a folder for each."""
    for number, pixels in enumerate(images):
        if number % 26 < 12:
            path = tmp_path / "twelve" / LETTERS[number % 26] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(255 - pixels).resize((112, 112)).save(path)
    return tmp_path / "twelve"


def test_a_folder_of_twelve_classes_becomes_a_model_of_twelve(
    folder: Path, tmp_path: Path, server_process: StartServer
) -> None:
    flags = ["--dataset", f"folder:{folder}", "--out", str(tmp_path / "run"), "--epochs", "2", "--teacher", "none"]
    assert main([*flags, "--validation-size", "4"]) == 0
    weights = tmp_path / "run" / "mnist_model.pth"
    assert load_checkpoint(weights).manifest.labels == tuple(LETTERS[:12])
    address, _ = server_process("--weights", str(weights))
    with client.Client(address) as letters:
        prediction = letters.classify(folder / "C" / "2.png", timeout=TIMEOUT)
        assert letters.get_model().labels == prediction.labels == tuple(LETTERS[:12])
    assert prediction.probabilities.shape == (12,)


# Served -------------------------------------------------------------------------


@pytest.fixture
def address(made: Made, server_process: StartServer) -> str:
    return server_process("--weights", str(made.weights), "--max-batch-size", "32")[0]


@dataclass
class Expected:
    """What a model says of all images."""

    version: str
    labels: tuple[str, ...]
    scores: Scores

    @property
    def letters(self) -> list[str]:
        return [self.labels[digit] for digit in self.scores.digits]

    def check(self, predictions: Sequence[object], which: slice = slice(None)) -> None:
        """The predictions are what the model says of some of the images."""
        scores = self.scores[which]
        assert len(predictions) == len(scores)
        for prediction, digit, probabilities in zip(predictions, scores.digits, scores.probabilities, strict=True):
            assert isinstance(prediction, client.Prediction), prediction
            assert (prediction.digit, prediction.label) == (digit, self.labels[digit])
            assert (prediction.model_version, prediction.labels) == (self.version, self.labels)
            assert prediction.probabilities.dtype == np.float32
            np.testing.assert_allclose(prediction.probabilities, probabilities, atol=1e-4)


def expected_of(weights: Path, images: Images) -> Expected:
    model = load_classifier(take_snapshot(weights), max_batch_size=32)
    checkpoint = model.checkpoint
    return Expected(checkpoint.version, checkpoint.manifest.labels, model.predict(images.reshape(-1, 784)))


def test_letters_are_read_by_every_method_of_the_client(made: Made, address: str, images: Images) -> None:
    expected = expected_of(made.weights, images)
    with client.Client(address, timeout=TIMEOUT) as letters:
        described = letters.get_model()
        assert described.labels == tuple(LETTERS)
        assert (described.dataset, described.digit_threshold) == ("EMNIST Letters", None)
        first = letters.classify(images[0])
        expected.check([first], slice(1))
        expected.check(letters.classify_batch(list(images)))
        expected.check(list(letters.stream_classify(list(images))))
        assert letters.explain(images[0]).mode == "RGB"
    assert first.probabilities.shape == (26,)
    assert (first.label, first.is_digit) == ("A", None)
    assert str(first) == f"Prediction(digit=0, label='A', confidence={first.confidence:.4f})"
    right = sum(read == LETTERS[number % 26] for number, read in enumerate(expected.letters))
    assert right > 0.9 * len(images), "upright, as they were before EMNIST's files had them in columns"


async def test_letters_are_read_by_the_client_for_asyncio(made: Made, address: str, images: Images) -> None:
    expected = expected_of(made.weights, images)
    async with client.AsyncClient(address, timeout=TIMEOUT) as letters:
        expected.check(await asyncio.gather(*(letters.classify(image) for image in images)))
        expected.check(await letters.classify_batch(images))
        expected.check([result async for result in letters.stream_classify(images)])


def test_letters_are_told_on_the_command_line(
    address: str, images: Images, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "k.png"
    Image.fromarray(images[10]).save(path)
    assert cli.main(["classify", str(path), "--target", address, "--top", "100"]) == 0
    words = capsys.readouterr().out.removeprefix(str(path)).split()
    assert words[0] == "K"
    assert sorted(words[::2]) == list(LETTERS)
    assert cli.main(["classify", str(path), "--target", address, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["digit"], answer["label"], len(answer["probabilities"])) == (10, "K", 26)


def test_letters_are_told_in_columns_of_26(made: Made, address: str, images: Images) -> None:
    rows = images.reshape(-1, 784)
    scores = expected_of(made.weights, images).scores
    with grpc.insecure_channel(address) as channel:
        classify: Any = channel.unary_unary(
            "/mnist.v1.DigitClassifier/Classify",
            pb.ClassifyRequest.SerializeToString,
            pb.ClassifyResponse.FromString,
        )
        for request in (
            pb.ClassifyRequest(pixels=rows.tobytes(), include_logits=True),
            pb.ClassifyRequest(
                features=((rows / np.float32(255) - 0.5) / 0.5).astype("<f4").tobytes(), include_logits=True
            ),
        ):
            response = classify(request, timeout=TIMEOUT)
            assert list(response.digits) == scores.digits.tolist()
            assert list(response.labels) == list(LETTERS)
            for given, expected in ((response.probabilities, scores.probabilities), (response.logits, scores.logits)):
                columns = np.array(given, np.float32).reshape(-1, 26)
                np.testing.assert_allclose(columns, expected, rtol=1e-3, atol=1e-3)


def test_letters_are_told_by_the_open_inference_protocol(made: Made, address: str, images: Images) -> None:
    rows = images.reshape(-1, 784)
    request = inference_pb.ModelInferRequest(model_name="mnist", raw_input_contents=[rows.tobytes()])
    request.inputs.add(name="pixels", datatype="UINT8", shape=rows.shape)
    request.outputs.add(name="probabilities")
    request.outputs.add(name="logits").parameters["classification"].int64_param = 1
    with grpc.insecure_channel(address) as channel:
        stub: Any = inference_grpc.GRPCInferenceServiceStub(channel)
        about = stub.ModelMetadata(inference_pb.ModelMetadataRequest(name="mnist"), timeout=TIMEOUT)
        response = stub.ModelInfer(request, timeout=TIMEOUT)
    assert {output.name: list(output.shape) for output in about.outputs}["probabilities"] == [-1, 26]
    assert [list(output.shape) for output in response.outputs] == [[len(rows), 26], [len(rows), 1]]
    told = [element.split(":")[2] for element in elements_of(response.raw_output_contents[1])]
    assert told == expected_of(made.weights, images).letters


def elements_of(content: bytes) -> Iterator[str]:
    while content:
        (length,) = struct.unpack_from("<I", content)
        yield content[4 : 4 + length].decode()
        content = content[4 + length :]


def test_letters_are_told_in_json(made: Made, images: Images, server_process: StartServer, tmp_path: Path) -> None:
    address, _ = server_process("--weights", str(made.weights), "--transport", "asgi")
    Image.fromarray(images[10]).save(tmp_path / "k.png")
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT)
    connection.request("POST", "/v1/classify", (tmp_path / "k.png").read_bytes(), {"content-type": "image/png"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    assert (answer["digits"], len(answer["probabilities"]), answer["labels"]) == ([10], 26, list(LETTERS))
    assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-3)


# Exchanged ------------------------------------------------------------------------


def test_ten_classes_and_twenty_six_are_exchanged_under_calls(
    made: Made, images: Images, tmp_path: Path, server_process: StartServer
) -> None:
    """Every answer is of one model as a whole, whatever way it came; each way meets each model after each reload."""
    place = tmp_path / "mnist_model.pth"
    ten, letters = (expected_of(weights, images) for weights in (DIGITS, made.weights))
    models = {model.version: model for model in (ten, letters)}
    put(DIGITS, place)
    address, _ = server_process(
        "--weights", str(place), "--reload-interval", "0", "--admin", "--max-batch-size", "32", "--stream-window", "64"
    )
    rows = images.reshape(-1, 784)
    over = threading.Event()
    seen: dict[str, queue.Queue[str | BaseException]] = {}

    def checked(predictions: Sequence[Any], which: slice) -> str:
        version: str = predictions[0].model_version
        models[version].check(predictions, which)
        return version

    def one_by_one(caller: client.Client) -> Iterator[str]:
        while not over.is_set():
            yield checked([caller.classify(images[0])], slice(1))

    def together(caller: client.Client) -> Iterator[str]:
        while not over.is_set():
            for part in (slice(0, 64), slice(40, 104)):  # a message each, which takes two batches
                yield checked(caller.classify_batch(images[part]), part)

    def in_a_stream(caller: client.Client) -> Iterator[str]:
        def frames() -> Iterator[Images]:
            while not over.is_set():
                yield images[0]

        for result in caller.stream_classify(frames()):
            yield checked([result], slice(1))

    def by_open_inference(_: client.Client) -> Iterator[str]:
        request = inference_pb.ModelInferRequest(model_name="mnist", raw_input_contents=[rows.tobytes()])
        request.inputs.add(name="pixels", datatype="UINT8", shape=rows.shape)
        request.outputs.add(name="logits").parameters["classification"].int64_param = 1
        request.outputs.add(name="probabilities")
        with grpc.insecure_channel(address) as channel:
            stub: Any = inference_grpc.GRPCInferenceServiceStub(channel)
            while not over.is_set():
                response = stub.ModelInfer(request, timeout=TIMEOUT)
                model = models[response.model_version]
                told = [element.split(":")[2] for element in elements_of(response.raw_output_contents[0])]
                assert told == model.letters
                given = np.frombuffer(response.raw_output_contents[1], "<f4").reshape(len(rows), len(model.labels))
                np.testing.assert_allclose(given, model.scores.probabilities, atol=1e-4)
                yield response.model_version

    def call(ask: Callable[[client.Client], Iterator[str]]) -> None:
        try:
            with client.Client(address, timeout=TIMEOUT) as caller:
                for version in ask(caller):
                    seen[ask.__name__].put(version)
        except BaseException as error:
            seen[ask.__name__].put(error)

    ways = (one_by_one, together, in_a_stream, by_open_inference)
    seen.update({way.__name__: queue.Queue() for way in ways})
    threads = [threading.Thread(target=call, args=(way,), name=way.__name__, daemon=True) for way in ways]

    def wait_until_all_meet(model: Expected) -> None:
        for answers in seen.values():
            while (answer := answers.get(timeout=TIMEOUT)) != model.version:
                if isinstance(answer, BaseException):
                    raise answer

    with grpc.insecure_channel(address) as channel:
        admin: Any = admin_grpc.ModelAdminStub(channel)
        for thread in threads:
            thread.start()
        try:
            wait_until_all_meet(ten)
            for weights, model in [(made.weights, letters), (DIGITS, ten)] * 3:
                put(weights, place)
                assert admin.Reload(admin_pb.ReloadRequest(), timeout=TIMEOUT).version == model.version
                wait_until_all_meet(model)
            assert admin.Rollback(admin_pb.RollbackRequest(), timeout=TIMEOUT).version == letters.version
            wait_until_all_meet(letters)
        finally:
            over.set()
        for thread in threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive()
    rest = [answers.get_nowait() for answers in seen.values() for _ in range(answers.qsize())]
    assert not [answer for answer in rest if isinstance(answer, BaseException)]
