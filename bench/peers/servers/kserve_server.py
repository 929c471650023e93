"""KServe's Python server: a model of our own, as its manual has it."""

from __future__ import annotations

import sys

from digit_network import Digits
from kserve import (  # type: ignore[import-not-found]
    InferOutput,
    InferRequest,
    InferResponse,
    Model,
    ModelServer,
)


class DigitsModel(Model):  # type: ignore[misc]
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._digits = Digits()
        self.ready = True

    async def predict(self, payload: InferRequest, headers: object = None, *_: object) -> InferResponse:
        probabilities = self._digits.probabilities(payload.inputs[0].as_numpy())
        output = InferOutput("probabilities", list(probabilities.shape), "FP32")
        output.set_data_from_numpy(probabilities)
        return InferResponse(payload.id, self.name, [output])


if __name__ == "__main__":
    grpc_port, http_port = map(int, sys.argv[1:])
    ModelServer(grpc_port=grpc_port, http_port=http_port, workers=1).start([DigitsModel("mnist")])
