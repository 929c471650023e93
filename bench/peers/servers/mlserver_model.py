"""MLServer: a runtime of our own, as its manual has it."""

from __future__ import annotations

from digit_network import Digits
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class DigitsModel(MLModel):  # type: ignore[misc]
    async def load(self) -> bool:
        self._digits = Digits()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        pixels = NumpyCodec.decode_input(payload.inputs[0])
        output = NumpyCodec.encode_output("probabilities", self._digits.probabilities(pixels))
        return InferenceResponse(model_name=self.name, outputs=[output])
