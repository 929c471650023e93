"""The gRPC side of the fake: messages in, what the script says out, as statuses and behaviour over the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import grpc
import numpy as np
import numpy.typing as npt

from client import _request_id
from client._types import Model
from client.testing._answers import Row
from client.testing._faults import Delay, Drop, Fault, Hang, Status
from client.testing._health import State
from client.testing._script import Request, Script
from digits.preprocessing import DIGITS, MEAN, PIXELS, STD, InvalidImage, to_pixels
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1.digit_classifier_pb2_grpc import DigitClassifierServicer

Pixels = npt.NDArray[np.uint8]

SCORE_OF_CERTAINTY = 10.0
"""The digit score is so many times the confidence."""

_FLOAT_BYTES = 4


class Servicer(DigitClassifierServicer):
    """mnist.v1.DigitClassifier on a script."""

    def __init__(self, script: Script, state: State, cut: Callable[[int], None]) -> None:
        self._script = script
        self._state = state
        self._cut = cut

    def Classify(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        try:
            pixels = read_images(request)
        except InvalidImage as error:
            _refuse(context, Status(grpc.StatusCode.INVALID_ARGUMENT, str(error)))
        self._note("Classify", pixels, context)
        self._refuse_unless_serving(context)
        if (fault := self._script.claim_fault(streaming=False)) is not None:
            self._go_wrong(fault, context)
        rows = self._script.answer(pixels)
        for row in rows:
            if isinstance(row, Status):
                _refuse(context, row)
        return self._result(rows, request.include_logits)

    def StreamClassify(
        self, request_iterator: Iterable[pb.StreamClassifyRequest], context: Any
    ) -> Iterator[pb.StreamClassifyResponse]:
        fault = self._script.claim_fault(streaming=True)
        answered = 0
        for message in request_iterator:
            sequence = message.first_sequence
            try:
                pixels = read_images(message.frames)
            except InvalidImage as error:
                status = Status(grpc.StatusCode.INVALID_ARGUMENT, str(error))
                yield pb.StreamClassifyResponse(blocks=[_error_block(sequence, 1, status)])
                continue
            self._note("StreamClassify", pixels, context)
            self._refuse_unless_serving(context)
            if fault is not None and answered + len(pixels) > fault.after:
                first = fault.after - answered
                if first:
                    yield self._blocks(sequence, pixels[:first], message.frames.include_logits)
                sequence, pixels = sequence + first, pixels[first:]
                self._go_wrong(fault, context)
                fault = None
            answered += len(pixels)
            yield self._blocks(sequence, pixels, message.frames.include_logits)
        if fault is not None:
            self._script.give_back(fault)

    def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        self._refuse_unless_serving(context)
        fields: dict[str, Any] = {name: getattr(self._state.model, name) for name in Model.__dataclass_fields__}
        return pb.GetModelResponse(**{name: value for name, value in fields.items() if value is not None})

    def _note(self, method: str, pixels: Pixels, context: Any) -> None:
        metadata = {entry.key: entry.value for entry in context.invocation_metadata()}
        left = context.time_remaining()
        # gRPC says "in many years" where there is no deadline, or nothing.
        self._script.note(Request(method, pixels, metadata, left if left is not None and left < 1e8 else None))

    def _refuse_unless_serving(self, context: Any) -> None:
        if not self._state.serving:
            context.abort(grpc.StatusCode.UNAVAILABLE, "FakeServer: `serving` is False")

    def _go_wrong(self, fault: Fault, context: Any) -> None:
        """Raise what ends the call, or return when it may go on."""
        action = fault.action
        if isinstance(action, Status):
            _refuse(context, action)
        if isinstance(action, Delay) and self._state.wait(context, timeout=action.seconds):
            return
        if isinstance(action, Drop):
            self._cut(int(context.peer().rpartition(":")[2]))
        if isinstance(action, Hang | Drop):
            self._state.wait(context)
        context.abort(grpc.StatusCode.UNAVAILABLE, "FakeServer was closed")  # nobody hears it

    def _result(self, rows: list[Row | Status], include_logits: bool) -> pb.ClassifyResponse:
        probabilities = np.stack([row for row in rows if not isinstance(row, Status)])
        model = self._state.model
        return pb.ClassifyResponse(
            digits=probabilities.argmax(axis=1).tolist(),
            probabilities=probabilities.ravel().tolist(),
            logits=np.log(np.maximum(probabilities, 1e-9)).ravel().tolist() if include_logits else (),
            receipt=pb.Receipt(model_version=model.version, batch_rows=len(rows)),
            digit_scores=(SCORE_OF_CERTAINTY * probabilities.max(axis=1)).tolist(),
            digit_threshold=model.digit_threshold,
            labels=model.labels if model.labels != DIGITS else (),
        )

    def _blocks(self, sequence: int, pixels: Pixels, include_logits: bool) -> pb.StreamClassifyResponse:
        """One block for each row of answers, and one for each error between them."""
        blocks: list[pb.FrameBlock] = []
        rows: list[Row | Status] = []

        def finish_rows(before: int) -> None:
            if rows:
                result = self._result(rows, include_logits)
                first = sequence + before - len(rows)
                blocks.append(pb.FrameBlock(first_sequence=first, frame_count=len(rows), result=result))
                rows.clear()

        for index, row in enumerate(self._script.answer(pixels)):
            if isinstance(row, Status):
                finish_rows(index)
                blocks.append(_error_block(sequence + index, 1, row))
            else:
                rows.append(row)
        finish_rows(len(pixels))
        return pb.StreamClassifyResponse(blocks=blocks)


def read_images(request: pb.ClassifyRequest) -> Pixels:
    """The images of a request, in whatever form it has them, as `uint8[n, 784]`.

    Raises:
        InvalidImage: it breaks a rule of the contract.
    """
    form = request.WhichOneof("images")
    if form == "encoded":
        pixels = np.array([to_pixels(file).reshape(PIXELS) for file in request.encoded.files], np.uint8)
    elif form == "features":
        features = _rows(request.features, "features", PIXELS * _FLOAT_BYTES).view("<f4")
        pixels = np.rint((features * STD + MEAN) * 255).clip(0, 255).astype(np.uint8)
    else:
        pixels = _rows(request.pixels, "pixels", PIXELS)
    if not len(pixels):
        raise InvalidImage("images: a request has one image or more, not 0")
    pixels.flags.writeable = False
    return pixels


def _rows(content: bytes, name: str, length: int) -> Pixels:
    if len(content) % length:
        raise InvalidImage(f"{name}: {length} bytes an image, not {len(content)} bytes in all")
    return np.frombuffer(content, np.uint8).reshape(-1, length)


def _error_block(sequence: int, count: int, status: Status) -> pb.FrameBlock:
    error = pb.FrameError(code=status.number, message=status.message, incident_id=status.incident_id)
    return pb.FrameBlock(first_sequence=sequence, frame_count=count, error=error)


def _refuse(context: Any, status: Status) -> NoReturn:
    # A server says so whether, and after how long, gRPC's own retry is to come again.
    pushback = -1 if status.retry_after is None else max(round(status.retry_after * 1000), 1)  # 0 stalls gRPC 1.85
    metadata = [("grpc-retry-pushback-ms", str(pushback))]
    if status.incident_id:
        metadata.append(("incident-id", status.incident_id))
    metadata += [(key, value) for key, value in context.invocation_metadata() if key == _request_id.KEY]
    context.set_trailing_metadata(tuple(metadata))
    context.abort(status.code, status.message)
    raise AssertionError("abort raises")
