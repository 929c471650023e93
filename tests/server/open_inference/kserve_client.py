"""Classify digits with KServe's unmodified Python client, and check what it says.

    python kserve_client.py HOST:PORT DIGITS.npz

A program of its own, in an environment of its own (scripts/open-inference-clients);
`triton_client.py` says what DIGITS.npz holds.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Mapping
from typing import Any

import grpc
import numpy as np
from kserve import (  # type: ignore[import-not-found]
    InferenceGRPCClient,
    InferInput,
    InferRequest,
)

ROWS = 50  # of a request
Digits = Mapping[str, Any]


def request_of(name: str, rows: Any, *, raw: bool, model: str = "mnist", **fields: Any) -> InferRequest:
    given = InferInput(name, list(rows.shape), {"pixels": "UINT8", "features": "FP32"}[name])
    given.set_data_from_numpy(rows, binary_data=raw)
    return InferRequest(model_name=model, infer_inputs=[given], **fields)


def check_answer(response: Any, digits: Digits, rows: slice) -> None:
    """The answer is what the model makes of these rows."""
    outputs = {output.name: output.as_numpy() for output in response.outputs}
    expected = digits["logits"][rows]
    assert outputs["digit"].tolist() == expected.argmax(axis=1).tolist()
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(outputs["probabilities"], digits["probabilities"][rows], atol=1e-4)


async def refusal(client: InferenceGRPCClient, request: InferRequest) -> grpc.RpcError:
    try:
        await client.infer(request)
    except grpc.RpcError as error:
        return error
    raise AssertionError("the call was not refused")


async def check_refusals(client: InferenceGRPCClient, digits: Digits) -> None:
    pixels, features = digits["pixels"][:1], digits["features"][:1]
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    for request, code, words in (
        (request_of("pixels", pixels, raw=True, model="chess"), grpc.StatusCode.NOT_FOUND, "chess"),
        (request_of("pixels", pixels[:, :783], raw=True), invalid, "[1, 783]"),
        (request_of("features", np.full_like(features, np.nan), raw=False), invalid, "finite"),
    ):
        error: Any = await refusal(client, request)
        assert error.code() == code, error
        assert words in error.details(), error


async def main(address: str, path: str) -> None:
    logging.getLogger("kserve.trace").setLevel(logging.CRITICAL)  # or each refusal below is logged with a traceback
    with np.load(path) as file:
        digits = dict(file)
    pixels = digits["pixels"]
    async with InferenceGRPCClient(address) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("mnist")
        for start in range(0, len(pixels), ROWS):
            rows = slice(start, start + ROWS)
            for name in ("pixels", "features"):
                for raw in (True, False):
                    response = await client.infer(request_of(name, digits[name][rows], raw=raw, request_id=f"{start}"))
                    assert response.id == f"{start}"
                    assert response.model_version == str(digits["version"])
                    check_answer(response, digits, rows)
        for shape in ((-1, 28, 28), (-1, 1, 28, 28)):
            check_answer(
                await client.infer(request_of("pixels", pixels[:ROWS].reshape(shape), raw=True)), digits, slice(0, ROWS)
            )
        await check_refusals(client, digits)
    print(f"{len(pixels)} digits, four ways")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
