"""Ray Serve by gRPC: the proxy hands requests of the Open Inference Protocol to replicas, which batch them."""

from __future__ import annotations

import signal
import sys

import numpy as np
import ray
from digit_network import CLASSES, PIXELS, Digits
from ray import serve
from ray.serve.config import HTTPOptions, gRPCOptions

from protos.inference import grpc_inference_service_pb2 as pb

SERVICE = "protos.inference.grpc_inference_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server"


@serve.deployment(num_replicas=1, max_ongoing_requests=128, ray_actor_options={"num_cpus": 1})
class Model:
    def __init__(self) -> None:
        self._digits = Digits()

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.001)  # type: ignore[untyped-decorator]
    async def _infer(self, requests: list[pb.ModelInferRequest]) -> list[pb.ModelInferResponse]:
        contents = [request.raw_input_contents[0] for request in requests]
        pixels = np.frombuffer(bytearray(b"".join(contents)), np.uint8).reshape(-1, PIXELS)
        ends = np.cumsum([len(content) // PIXELS for content in contents])[:-1]
        return [_response(rows) for rows in np.split(self._digits.probabilities(pixels), ends)]

    async def ModelInfer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        response: pb.ModelInferResponse = await self._infer(request)
        return response


def _response(probabilities: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> pb.ModelInferResponse:
    output = pb.ModelInferResponse.InferOutputTensor(
        name="probabilities", datatype="FP32", shape=(len(probabilities), CLASSES)
    )
    return pb.ModelInferResponse(model_name="mnist", outputs=[output], raw_output_contents=[probabilities.tobytes()])


if __name__ == "__main__":
    grpc_port, http_port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, _temp_dir=folder)
    serve.start(
        http_options=HTTPOptions(host="127.0.0.1", port=http_port),
        grpc_options=gRPCOptions(port=grpc_port, grpc_servicer_functions=[SERVICE]),
    )
    serve.run(Model.bind())  # type: ignore[attr-defined]
    signal.sigwait({signal.SIGTERM})
    ray.shutdown()
