"""Triton's Python backend: the requests of a batch are computed together."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as utils
from digit_network import Digits


class TritonPythonModel:
    def initialize(self, arguments: dict[str, str]) -> None:
        self._digits = Digits()

    def execute(self, requests: list[Any]) -> list[Any]:
        pixels = [utils.get_input_tensor_by_name(request, "pixels").as_numpy() for request in requests]
        probabilities = self._digits.probabilities(np.concatenate(pixels))
        ends = np.cumsum([len(rows) for rows in pixels])[:-1]
        return [
            utils.InferenceResponse([utils.Tensor("probabilities", rows)]) for rows in np.split(probabilities, ends)
        ]
