"""How a system is asked: the bytes of a request, and the digits in its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.peers.links import GrpcLink, HttpLink, Link
from digits.preprocessing import CLASSES
from protos.inference import grpc_inference_service_pb2 as oip
from protos.mnist.v1 import digit_classifier_pb2 as mnist

MODEL, INPUT, OUTPUT = "mnist", "pixels", "probabilities"
"""The names that the peers' models have in the Open Inference Protocol."""

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Dialect:
    """What a system is spoken to."""

    connect: Callable[[str], Link]
    """To `host:port`."""
    is_multiplexed: bool
    """Whether a connection takes more than one request at a time."""
    request: Callable[[Pixels], bytes]
    """The message for pixels `uint8[n, 784]`."""
    digits: Callable[[bytes], list[int]]
    """Of the answer's message."""


def _mnist_request(pixels: Pixels) -> bytes:
    return mnist.ClassifyRequest(pixels=pixels.tobytes()).SerializeToString()


def _mnist_digits(answer: bytes) -> list[int]:
    return list(mnist.ClassifyResponse.FromString(answer).digits)


def _oip_request(pixels: Pixels) -> bytes:
    tensor = oip.ModelInferRequest.InferInputTensor(name=INPUT, datatype="UINT8", shape=pixels.shape)
    request = oip.ModelInferRequest(model_name=MODEL, inputs=[tensor], raw_input_contents=[pixels.tobytes()])
    return request.SerializeToString()


def _oip_digits(answer: bytes) -> list[int]:
    response = oip.ModelInferResponse.FromString(answer)
    if response.raw_output_contents:
        return _largest(response.raw_output_contents[0])
    return _largest(np.array(response.outputs[0].contents.fp32_contents, np.float32).tobytes())


def _largest(probabilities: bytes) -> list[int]:
    """The digits of raw probabilities, `float32[n, 10]`."""
    digits: list[int] = np.frombuffer(probabilities, np.float32).reshape(-1, CLASSES).argmax(axis=1).tolist()
    return digits


def _raw(path: str) -> Dialect:
    return Dialect(lambda target: HttpLink(target, path), False, lambda pixels: pixels.tobytes(), _largest)


def _grpc(path: str, request: Callable[[Pixels], bytes], digits: Callable[[bytes], list[int]]) -> Dialect:
    return Dialect(lambda target: GrpcLink(target, path), True, request, digits)


DIALECTS = {
    "ours": _grpc("/mnist.v1.DigitClassifier/Classify", _mnist_request, _mnist_digits),
    "open inference": _grpc("/inference.GRPCInferenceService/ModelInfer", _oip_request, _oip_digits),
    "raw /classify": _raw("/classify"),
    "raw /predictions/mnist": _raw("/predictions/mnist"),
}
