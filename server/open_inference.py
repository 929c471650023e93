"""What the methods of `inference.GRPCInferenceService` do, without a word of any transport.

The Open Inference Protocol V2 with Triton's stream, classification,
configuration and statistics, over the batcher and the model of DigitService.
docs/open-inference.md says what is offered; `server/tensors.py` has the rules
of the tensors.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeAlias

from protos.inference import grpc_inference_service_pb2 as pb
from server import tensors
from server.batching import Flow
from server.errors import InvalidArgument, NotFound, NotServing, ServiceError
from server.service import (
    MODEL_NAME,
    DigitService,
    Observed,
    deadline_after,
    named_errors,
)
from server.settings import Settings
from server.statistics import Statistics
from server.version import server_version

if TYPE_CHECKING:
    from server.inference import Classifier

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

SERVER_NAME = "mnist-grpc"
PLATFORM = "pytorch_state_dict"
BACKEND = "pytorch"
EXTENSIONS = ("classification", "model_configuration", "statistics")

MAX_ID_BYTES = 1024
"""An id comes back, and a stream holds the answers that its caller does not read."""

Read: TypeAlias = Callable[[], Awaitable[pb.ModelInferRequest | None]]
Write: TypeAlias = Callable[[pb.ModelStreamInferResponse], Awaitable[None]]


class OpenInference:
    """The service's methods; messages in, messages or a ServiceError out."""

    def __init__(
        self, service: DigitService, settings: Settings, statistics: Statistics, is_serving: Callable[[], bool]
    ) -> None:
        """Offer the model of a service.

        Args:
            service: has the model and the batcher.
            settings: those of the service.
            statistics: among the observers of the service.
            is_serving: whether health says SERVING.
        """
        self._service = service
        self._settings = settings
        self._statistics = statistics
        self._is_serving = is_serving

    # What is here -------------------------------------------------------------

    def server_live(self, request: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        """Say that the server answers."""
        with self._observed("ServerLive"):
            return pb.ServerLiveResponse(live=True)

    def server_ready(self, request: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        """Say whether health is SERVING."""
        with self._observed("ServerReady"):
            return pb.ServerReadyResponse(ready=self._is_serving())

    def model_ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        """Say the same of the model."""
        with self._observed("ModelReady"), named_errors():
            try:
                self._model(request.name, request.version)
            except NotServing:  # a model that is here, and not loaded yet
                return pb.ModelReadyResponse(ready=False)
            return pb.ModelReadyResponse(ready=self._is_serving())

    def server_metadata(self, request: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        """Describe the server."""
        with self._observed("ServerMetadata"):
            return pb.ServerMetadataResponse(name=SERVER_NAME, version=server_version(), extensions=EXTENSIONS)

    def model_metadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        """Describe the model's tensors."""
        with self._observed("ModelMetadata"), named_errors():
            model = self._model(request.name, request.version)
            inputs, outputs = tensors.metadata(len(model.checkpoint.manifest.labels))
            return pb.ModelMetadataResponse(
                name=MODEL_NAME,
                versions=[model.checkpoint.version],
                platform=PLATFORM,
                inputs=inputs,
                outputs=outputs,
            )

    def model_config(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        """Describe how the model is served."""
        with self._observed("ModelConfig"), named_errors():
            model = self._model(request.name, request.version)
            inputs, outputs = tensors.config(len(model.checkpoint.manifest.labels))
            return pb.ModelConfigResponse(
                config=pb.ModelConfig(
                    name=MODEL_NAME,
                    platform=PLATFORM,
                    backend=BACKEND,
                    max_batch_size=self._settings.max_batch_size,
                    input=inputs,
                    output=outputs,
                    dynamic_batching=pb.ModelDynamicBatching(
                        max_queue_delay_microseconds=int(self._settings.max_wait_ms * 1000)
                    ),
                )
            )

    def model_statistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        """Say what the model has computed."""
        with self._observed("ModelStatistics"), named_errors():
            model = self._model(request.name or MODEL_NAME, request.version)
            statistics = self._statistics.message(MODEL_NAME, model.checkpoint.version)
            return pb.ModelStatisticsResponse(model_stats=[statistics])

    # What it computes ---------------------------------------------------------

    async def model_infer(self, request: pb.ModelInferRequest, timeout: float | None = None) -> pb.ModelInferResponse:
        """Answer the rows of a request; `timeout` is what is left of the caller's deadline, in seconds."""
        deadline = deadline_after(timeout)
        with self._observed("ModelInfer", deadline), named_errors():
            return await self._infer(request, deadline, None)

    async def model_stream_infer(self, read: Read, write: Write, timeout: float | None = None) -> None:
        """Answer requests in order until `read` returns None; see `OrderedStream`."""
        deadline = deadline_after(timeout)
        flow = Flow()  # one for all of its requests, so that many of them do not crowd out other callers

        async def write_each(replies: list[pb.ModelStreamInferResponse]) -> None:
            for reply in replies:
                await write(reply)

        with self._observed("ModelStreamInfer", deadline), named_errors():
            self._service.model  # noqa: B018  # raises while there is none
            await self._service.run_stream(
                _measure, lambda request: self._answer(request, deadline, flow), read, write_each
            )

    async def _answer(
        self, request: pb.ModelInferRequest, deadline: float | None, flow: Flow
    ) -> pb.ModelStreamInferResponse:
        """Answer one request of a stream; its error stands in its place."""
        try:
            with named_errors():
                return pb.ModelStreamInferResponse(infer_response=await self._infer(request, deadline, flow))
        except ServiceError as error:
            response = pb.ModelStreamInferResponse(error_message=f"{error.code}: {error}")
            response.infer_response.model_name = MODEL_NAME
            if len(request.id) <= MAX_ID_BYTES:
                response.infer_response.id = request.id
            return response

    async def _infer(
        self, request: pb.ModelInferRequest, deadline: float | None, flow: Flow | None
    ) -> pb.ModelInferResponse:
        self._model(request.model_name, request.model_version)
        if len(request.id) > MAX_ID_BYTES:
            raise InvalidArgument("id", f"an id has at most {MAX_ID_BYTES} characters, this one has {len(request.id)}")
        wanted = tensors.read_wanted(request)
        if (own := deadline_after(tensors.read_timeout(request))) is not None:
            deadline = own if deadline is None else min(own, deadline)
        rows = tensors.read_rows(
            request, max_rows=self._settings.max_queue_size, max_bytes=self._settings.max_message_bytes
        )
        scores = [answer.result for answer in await self._service.compute(rows, deadline, flow)]
        version = scores[-1].model_version
        if request.model_version and request.model_version != version:
            raise _no_version(request.model_version, version)  # it was exchanged while the request waited
        response = pb.ModelInferResponse(model_name=MODEL_NAME, model_version=version, id=request.id)
        tensors.write_outputs(response, wanted, scores)
        return response

    # Steps --------------------------------------------------------------------

    def _observed(self, method: str, deadline: float | None = None) -> Observed:
        return Observed(self._service, f"{SERVICE_NAME}/{method}", deadline)

    def _model(self, name: str, version: str) -> Classifier:
        """The model of this name and version, where an empty version is any.

        Raises:
            NotFound: there is none.
            NotServing: it is not loaded yet.
        """
        if name != MODEL_NAME:
            raise NotFound(f"the model here is {MODEL_NAME!r}, not {tensors.quoted(name)}")
        model = self._service.model
        if version and version != model.checkpoint.version:
            raise _no_version(version, model.checkpoint.version)
        return model


def _no_version(asked: str, served: str) -> NotFound:
    return NotFound(f"version {served!r} of model {MODEL_NAME!r} is served, not {tensors.quoted(asked)}")


def _measure(request: pb.ModelInferRequest) -> tuple[int, int]:
    return tensors.count_rows(request), tensors.count_bytes(request)
