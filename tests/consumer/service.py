"""What a program of a user's says to the SDK, for `mypy --strict`: see tests/test_types_for_users.py.

A line that must not be accepted is marked `type: ignore`; strict mode complains
where nothing is to be ignored, so a type that decays to Any is found.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import assert_type

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import client
from client.testing import FakeServer, Request, digit_png

pytest_plugins = ["client.testing.pytest_plugin"]


def images() -> list[client.Image]:
    grey = np.zeros((28, 28), np.uint8)
    rgb = np.zeros((28, 28, 3), np.float64)
    return [
        "a.png",
        Path("a.png"),
        b"",
        bytearray(),
        memoryview(b""),
        io.BytesIO(),
        Image.new("L", (9, 9)),
        grey,
        rgb,
    ]


def results(prediction: client.Prediction, model: client.Model) -> None:
    assert_type(prediction.digit, int)
    assert_type(prediction.confidence, float)
    assert_type(prediction.probabilities, npt.NDArray[np.float32])
    assert_type(prediction.model_version, str)
    assert_type(prediction.digit_score, float)
    assert_type(prediction.is_digit, bool | None)
    assert_type(prediction.label, str)
    assert_type(prediction.labels, tuple[str, ...])
    assert_type(model.digit_threshold, float | None)
    assert_type(model.labels, tuple[str, ...])
    assert_type(model.test_accuracy, float | None)
    assert_type(dataclasses.replace(model, version="2"), client.Model)
    prediction.digit = 3  # type: ignore[misc]
    prediction.digits  # type: ignore[attr-defined]  # noqa: B018
    print(prediction.digit + "px")  # type: ignore[operator]


def sync() -> None:
    assert_type(client.classify("digit.png", target="localhost:50051", timeout=1), client.Prediction)
    with client.Client("localhost:50051", timeout=2.5) as digits:
        assert_type(digits, client.Client)
        assert_type(digits.target, str)
        for image in images():
            assert_type(digits.classify(image, timeout=1), client.Prediction)
        assert_type(digits.classify_batch(images()), list[client.Prediction])
        assert_type(digits.classify_batch(np.zeros((2, 28, 28), np.uint8)), list[client.Prediction])
        assert_type(digits.get_model(), client.Model)
        assert_type(digits.is_serving(), bool)
        digits.wait_ready(5)
        for result in digits.stream_classify(iter(images()), window=8, latest_only=True):
            assert_type(result, client.Prediction | client.MnistGrpcError)
            if isinstance(result, client.OvertakenError):
                continue
            if isinstance(result, client.Prediction):
                results(result, digits.get_model())
            else:
                assert_type(result, client.MnistGrpcError)
        digits.classify(7)  # type: ignore[arg-type]
        digits.classify("a.png", timeout="1")  # type: ignore[arg-type]
        digits.classify("a.png", 1)  # type: ignore[call-arg]
        digits.classify_batch(7)  # type: ignore[arg-type]
        digits.stream_classify("a.png", windows=8)  # type: ignore[call-arg]
        digits.clasify("a.png")  # type: ignore[attr-defined]


async def asynchronous() -> None:
    async def camera() -> AsyncIterator[npt.NDArray[np.uint8]]:
        yield np.zeros((28, 28), np.uint8)

    async with client.AsyncClient() as digits:
        assert_type(digits, client.AsyncClient)
        assert_type(await digits.classify("a.png"), client.Prediction)
        assert_type(await digits.classify_batch(images()), list[client.Prediction])
        assert_type(await digits.get_model(), client.Model)
        assert_type(await digits.is_serving(), bool)
        await digits.wait_ready(5)
        async for result in digits.stream_classify(camera()):
            assert_type(result, client.Prediction | client.MnistGrpcError)
        async for result in digits.stream_classify(images()):
            assert_type(result, client.Prediction | client.MnistGrpcError)
        await digits.classify(7)  # type: ignore[arg-type]
        digits.classify("a.png").digit  # type: ignore[attr-defined]  # noqa: B018


def settings() -> None:
    client.Client(["a:1", "b:2"], tls=client.TLS(ca="ca.pem"), token=lambda: "t", metadata={"a": "b"}, connections=2)
    client.AsyncClient("a:1", tls=True, token="t", wait_for_ready=True)
    client.Client(target=7)  # type: ignore[arg-type]
    client.AsyncClient(timeout="1")  # type: ignore[arg-type]
    client.Client(tls="yes")  # type: ignore[arg-type]
    client.TLS(ca=7)  # type: ignore[arg-type]


def errors() -> str:
    try:
        client.classify("a.png")
    except client.InvalidImageError as error:
        assert_type(error.index, int | None)
        bad: ValueError = error
        return str(bad)
    except (client.DeadlineExceededError, client.OverloadedError, client.UnavailableError) as error:
        assert_type(error.code, str | None)
    except client.MnistGrpcError as error:
        assert_type(error.incident_id, str | None)
        return error.incident_id  # type: ignore[return-value]
    return ""


@pytest.fixture
def digits(digit_server: FakeServer) -> Iterator[client.Client]:
    with client.Client(digit_server.target) as digits:
        yield digits


def test_of_a_user(digit_server: FakeServer, digits: client.Client) -> None:
    digit_server.answers = 7
    digit_server.answers = [3, (1, 0.5), [0.1] * 10, client.ServerError, client.InvalidImageError("bad")]
    digit_server.answers = np.full((5, 10), 0.1, np.float32)
    digit_server.answers = lambda pixels: int(pixels.sum()) % 10
    digit_server.answers = None
    digit_server.fail_next(client.OverloadedError, times=2, retry_after=0.1)
    digit_server.fail_next("DATA_LOSS", after=3)
    digit_server.delay_next(0.5)
    digit_server.hang_next()
    digit_server.drop_connection_next()
    with digit_server.unreachable(), digit_server.silent():
        digits.classify(digit_png(7))
    assert_type(digit_server.target, str)
    assert_type(digit_server.requests, list[Request])
    assert_type(digit_server.wait_for_requests()[0].pixels, npt.NDArray[np.uint8])
    digit_server.model = dataclasses.replace(digit_server.model, version="2")
    with FakeServer([1, 2]) as another:
        assert_type(another, FakeServer)
    digit_server.answers = "seven"  # type: ignore[assignment]
    digit_server.answers = lambda pixels: "seven"  # type: ignore[assignment,return-value]
    digit_server.fail_next(ValueError)  # type: ignore[arg-type]
    digit_server.fail_next(7)  # type: ignore[arg-type]
    digit_server.delay_next("1")  # type: ignore[arg-type]
    digit_png("7")  # type: ignore[arg-type]
