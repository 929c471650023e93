"""PyTriton: a function in this process, called with batches by the Triton that it starts."""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt
from digit_network import CLASSES, PIXELS, Digits
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

digits = Digits()


@batch  # type: ignore[untyped-decorator]
def infer(pixels: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
    return {"probabilities": digits.probabilities(pixels)}


if __name__ == "__main__":
    grpc_port, http_port, metrics_port = map(int, sys.argv[1:4])
    config = TritonConfig(
        grpc_address="127.0.0.1", grpc_port=grpc_port, http_address="127.0.0.1", http_port=http_port,
        metrics_port=metrics_port, allow_metrics=False,
    )  # fmt: skip
    with Triton(config=config, workspace=sys.argv[4]) as triton:
        triton.bind(
            model_name="mnist",
            infer_func=infer,
            inputs=[Tensor(name="pixels", dtype=np.uint8, shape=(PIXELS,))],
            outputs=[Tensor(name="probabilities", dtype=np.float32, shape=(CLASSES,))],
            config=ModelConfig(max_batch_size=256, batcher=DynamicBatcher()),
        )
        triton.serve()
