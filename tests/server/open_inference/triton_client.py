"""Classify digits with Triton's unmodified Python client, and check what it says.

    python triton_client.py HOST:PORT DIGITS.npz

A program of its own, in an environment of its own (scripts/open-inference-clients).
DIGITS.npz holds, for n digits: pixels `uint8[n, 784]`, features `float32[n, 784]`,
and what the model makes of them: probabilities and logits, `float32[n, 10]`, and
its `version`.
"""

from __future__ import annotations

import asyncio
import queue
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
import tritonclient.grpc as triton  # type: ignore[import-not-found]
import tritonclient.grpc.aio as triton_aio  # type: ignore[import-not-found]
from tritonclient.utils import InferenceServerException  # type: ignore[import-not-found]

ROWS = 50  # of a request
TIMEOUT = 60
Digits = Mapping[str, Any]


def tensor(name: str, rows: Any, shape: Sequence[int] = (784,)) -> Any:
    datatype = {"pixels": "UINT8", "features": "FP32"}[name]
    given = triton.InferInput(name, [len(rows), *shape], datatype)
    given.set_data_from_numpy(rows.reshape(-1, *shape))
    return given


def check_answer(result: Any, digits: Digits, rows: slice) -> None:
    """The answer is what the model makes of these rows."""
    expected = digits["logits"][rows]
    assert result.as_numpy("digit").dtype == np.int64
    assert result.as_numpy("digit").tolist() == expected.argmax(axis=1).tolist()
    np.testing.assert_allclose(result.as_numpy("logits"), expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(result.as_numpy("probabilities"), digits["probabilities"][rows], atol=1e-4)


def slices(digits: Digits) -> list[slice]:
    return [slice(start, start + ROWS) for start in range(0, len(digits["pixels"]), ROWS)]


def refusal(call: Any, *arguments: Any, **named: Any) -> InferenceServerException:
    try:
        call(*arguments, **named)
    except InferenceServerException as error:
        return error
    raise AssertionError("the call was not refused")


def check_descriptions(client: Any, version: str) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mnist")
    assert client.is_model_ready("mnist", version)
    assert "classification" in client.get_server_metadata().extensions
    metadata = client.get_model_metadata("mnist")
    assert list(metadata.versions) == [version]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [
        ("pixels", "UINT8", [-1, 784]),
        ("features", "FP32", [-1, 784]),
    ]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [
        ("digit", "INT64", [-1]),
        ("probabilities", "FP32", [-1, 10]),
        ("logits", "FP32", [-1, 10]),
        ("digit_score", "FP32", [-1]),
    ]
    config = client.get_model_config("mnist").config
    assert config.name == "mnist"
    assert config.max_batch_size >= 1
    assert config.HasField("dynamic_batching")
    assert [list(given.dims) for given in config.input] == [[784], [784]]


def check_statistics(client: Any, before: int, rows: int) -> None:
    (after,) = client.get_inference_statistics("mnist").model_stats
    assert after.inference_count - before >= rows
    assert 0 < after.execution_count <= after.inference_count
    assert sum(batch.batch_size * batch.compute_infer.count for batch in after.batch_stats) == after.inference_count
    assert after.inference_stats.success.ns >= after.inference_stats.compute_infer.ns > 0


def check_sync(client: Any, digits: Digits) -> None:
    version = str(digits["version"])
    for rows in slices(digits):
        result = client.infer("mnist", [tensor("pixels", digits["pixels"][rows])], request_id=f"rows {rows.start}")
        assert result.get_response().id == f"rows {rows.start}"
        assert result.get_response().model_version == version
        check_answer(result, digits, rows)
    first = slice(0, ROWS)
    for shape in ((784,), (28, 28), (1, 28, 28)):
        for name in ("pixels", "features"):
            result = client.infer("mnist", [tensor(name, digits[name][first], shape)], model_version=version)
            check_answer(result, digits, first)
    compressed = client.infer("mnist", [tensor("pixels", digits["pixels"][first])], compression_algorithm="gzip")
    check_answer(compressed, digits, first)


def check_outputs(client: Any, digits: Digits) -> None:
    pixels, probabilities = digits["pixels"][:ROWS], digits["probabilities"][:ROWS]
    wanted = [triton.InferRequestedOutput("probabilities", class_count=3), triton.InferRequestedOutput("digit")]
    result = client.infer("mnist", [tensor("pixels", pixels)], outputs=wanted)
    assert [output.name for output in result.get_response().outputs] == ["probabilities", "digit"]
    assert result.as_numpy("logits") is None
    classes = result.as_numpy("probabilities")
    assert classes.shape == (len(pixels), 3)
    for row, expected, digit in zip(classes, probabilities, result.as_numpy("digit"), strict=True):
        values, indices, labels = zip(*(element.decode().split(":") for element in row), strict=True)
        assert indices == labels  # ours are the digits themselves
        assert int(indices[0]) == digit
        np.testing.assert_allclose([float(value) for value in values], np.sort(expected)[::-1][:3], atol=1e-4)


def check_refusals(client: Any, digits: Digits) -> None:
    good = [tensor("pixels", digits["pixels"][:1])]
    assert refusal(client.infer, "chess", good).status() == "StatusCode.NOT_FOUND"
    assert refusal(client.infer, "mnist", good, model_version="7").status() == "StatusCode.NOT_FOUND"
    assert refusal(client.get_model_metadata, "chess").status() == "StatusCode.NOT_FOUND"
    bad = tensor("pixels", digits["pixels"][:1, :783], (783,))
    error = refusal(client.infer, "mnist", [bad])
    assert error.status() == "StatusCode.INVALID_ARGUMENT"
    assert "[1, 783]" in error.message()


def check_async(client: Any, digits: Digits) -> None:
    """All requests at once, answered to callbacks."""
    answers: queue.Queue[tuple[slice, Any, Any]] = queue.Queue()
    for rows in slices(digits):
        client.async_infer(
            "mnist",
            [tensor("pixels", digits["pixels"][rows])],
            lambda result, error, rows=rows: answers.put((rows, result, error)),
        )
    for _ in slices(digits):
        rows, result, error = answers.get(timeout=TIMEOUT)
        assert error is None, error
        check_answer(result, digits, rows)


def check_stream(client: Any, digits: Digits) -> None:
    """One digit a request, all sent before an answer is waited for, every tenth of them bad."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for index, row in enumerate(digits["pixels"]):
        given = tensor("pixels", row[None])
        if index % 10 == 9:
            given = tensor("pixels", row[None, :783], (783,))
        client.async_stream_infer("mnist", [given], request_id=str(index))
    for index in range(len(digits["pixels"])):
        result, error = answers.get(timeout=TIMEOUT)
        if index % 10 == 9:
            assert "INVALID_ARGUMENT" in error.message()
            assert "[1, 783]" in error.message()
        else:
            assert error is None, error
            assert result.get_response().id == str(index)
            check_answer(result, digits, slice(index, index + 1))
    client.stop_stream()


async def check_aio(address: str, digits: Digits) -> None:
    async with triton_aio.InferenceServerClient(address) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("mnist")
        requests = [client.infer("mnist", [tensor("pixels", digits["pixels"][rows])]) for rows in slices(digits)]
        for rows, result in zip(slices(digits), await asyncio.gather(*requests), strict=True):
            check_answer(result, digits, rows)

        async def stream() -> AsyncIterator[dict[str, Any]]:
            for index, row in enumerate(digits["pixels"]):
                yield {"model_name": "mnist", "inputs": [tensor("pixels", row[None])], "request_id": str(index)}

        count = 0
        async for result, error in client.stream_infer(stream()):
            assert error is None, error
            assert result.get_response().id == str(count)
            check_answer(result, digits, slice(count, count + 1))
            count += 1
        assert count == len(digits["pixels"])


def main(address: str, path: str) -> None:
    with np.load(path) as file:
        digits = dict(file)
    with triton.InferenceServerClient(address) as client:
        check_descriptions(client, str(digits["version"]))
        before = client.get_inference_statistics("mnist").model_stats[0].inference_count
        check_sync(client, digits)
        check_outputs(client, digits)
        check_refusals(client, digits)
        check_async(client, digits)
        check_stream(client, digits)
        check_statistics(client, before, 2 * len(digits["pixels"]))
    asyncio.run(check_aio(address, digits))
    print(f"{len(digits['pixels'])} digits, five ways")


if __name__ == "__main__":
    main(*sys.argv[1:])
