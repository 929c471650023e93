"""LitServe: pixels in the body, probabilities in the answer, batches by its worker.

No `from __future__ import annotations`: LitServe reads the annotations.
"""

import sys
from typing import Annotated

import litserve
import numpy as np
import numpy.typing as npt
from digit_network import PIXELS, Digits
from fastapi import Body, Response

Pixels = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]


class Api(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        self._digits = Digits()

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> Pixels:
        return np.frombuffer(bytearray(request), np.uint8).reshape(-1, PIXELS)

    def batch(self, inputs: list[Pixels]) -> tuple[Pixels, list[int]]:
        return np.concatenate(inputs), [len(pixels) for pixels in inputs]

    def predict(self, batch: tuple[Pixels, list[int]]) -> list[Probabilities]:
        pixels, counts = batch
        return np.split(self._digits.probabilities(pixels), np.cumsum(counts)[:-1])

    def unbatch(self, output: list[Probabilities]) -> list[Probabilities]:
        return output

    def encode_response(self, output: Probabilities) -> Response:
        return Response(output.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    api = Api(api_path="/classify", max_batch_size=64, batch_timeout=0.001)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
