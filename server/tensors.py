"""Tensors of the Open Inference Protocol: a request's into rows, scores into a response's.

Every rule of the tensors is checked here, before queueing. Knows the messages
and NumPy; knows neither the queue nor a transport.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from digits.preprocessing import DIGITS, PIXELS, SIDE
from protos.inference import grpc_inference_service_pb2 as pb
from server.errors import InvalidArgument
from server.inputs import MAX_FEATURE, Rows

if TYPE_CHECKING:
    from server.inference import Scores

Parameters: TypeAlias = Mapping[str, pb.InferParameter]

ROW_SHAPES = ((PIXELS,), (SIDE, SIDE), (1, SIDE, SIDE))
"""The shapes that a row of an input may have; row-major, they are one and the same memory."""


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor that the model takes."""

    datatype: str
    config_type: pb.DataType.ValueType
    dtype: np.dtype[Any]
    """Of an element in raw form."""
    contents: str
    """The field of InferTensorContents that holds its elements in typed form."""


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that the model gives."""

    datatype: str
    config_type: pb.DataType.ValueType
    is_by_class: bool
    """Whether a row has a value for each class; else it has one."""
    values: Callable[[Scores], npt.NDArray[Any]]
    """Its elements in raw form."""


INPUTS = {
    "pixels": Input("UINT8", pb.TYPE_UINT8, np.dtype(np.uint8), "uint_contents"),
    "features": Input("FP32", pb.TYPE_FP32, np.dtype("<f4"), "fp32_contents"),
}
OUTPUTS = {
    "digit": Output("INT64", pb.TYPE_INT64, False, lambda scores: scores.digits.astype("<i8")),
    "probabilities": Output("FP32", pb.TYPE_FP32, True, lambda scores: scores.probabilities.astype("<f4")),
    "logits": Output("FP32", pb.TYPE_FP32, True, lambda scores: scores.logits.astype("<f4")),
    "digit_score": Output("FP32", pb.TYPE_FP32, False, lambda scores: scores.digit_scores.astype("<f4")),
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """An output that a request asks for."""

    name: str
    top: int | None = None
    """As so many of the highest classes, or as all where there are fewer; else as it is."""


def quoted(text: str) -> str:
    """A caller's text for a message of ours, which has to stay short."""
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


# From a request -----------------------------------------------------------------


def count_rows(request: pb.ModelInferRequest) -> int:
    """How many rows a request says that it carries, 1 or more, before anything is checked."""
    return max(1, *(tensor.shape[0] for tensor in request.inputs if tensor.shape), 1)


def count_bytes(request: pb.ModelInferRequest) -> int:
    """The length of a request's tensors, about, in whichever form."""
    typed = sum(len(tensor.contents.fp32_contents) + len(tensor.contents.uint_contents) for tensor in request.inputs)
    return 4 * typed + sum(len(content) for content in request.raw_input_contents)


def read_rows(request: pb.ModelInferRequest, *, max_rows: int, max_bytes: int) -> Rows:
    """View the one input of a request as pixels or features, `[n, 784]`.

    Raises:
        InvalidArgument: there is not exactly one input, or its name, datatype,
            shape, size or a value breaks a rule.
    """
    if len(request.inputs) != 1:
        names = ", ".join(quoted(tensor.name) for tensor in request.inputs[:4])
        raise InvalidArgument(
            "inputs",
            f"a request carries exactly one of the tensors {_listed(INPUTS)}, "
            f"this one carries {len(request.inputs)}" + (f": {names}" if names else ""),
        )
    tensor = request.inputs[0]
    if (kind := INPUTS.get(tensor.name)) is None:
        raise InvalidArgument(
            "inputs[0].name", f"the model takes one of the tensors {_listed(INPUTS)}, not {quoted(tensor.name)}"
        )
    if tensor.datatype != kind.datatype:
        raise InvalidArgument(
            "inputs[0].datatype", f"tensor {tensor.name} is {kind.datatype}, not {quoted(tensor.datatype)}"
        )
    _refuse_shared_memory("inputs[0]", tensor.name, tensor.parameters)
    rows = _rows_of_shape(tensor.name, tensor.shape)
    if rows > max_rows:
        raise InvalidArgument(
            "inputs[0].shape", f"tensor {tensor.name} has at most {max_rows} rows a request, this one has {rows}"
        )
    if (size := rows * PIXELS * kind.dtype.itemsize) > max_bytes:
        raise InvalidArgument(
            "inputs[0].shape",
            f"tensor {tensor.name} has at most {max_bytes} bytes a request, this one has {size} in {rows} rows",
        )
    elements = _raw(request, tensor, kind, rows) if request.raw_input_contents else _typed(tensor, kind, rows)
    elements = elements.reshape(rows, PIXELS)
    if elements.dtype == np.float32:
        _check_features(tensor.name, elements)
    return elements


def read_wanted(request: pb.ModelInferRequest) -> list[Wanted]:
    """The outputs that a request asks for, in its order; all where it names none.

    Raises:
        InvalidArgument: a name is unknown or stands twice, or a parameter breaks a rule.
    """
    if not request.outputs:
        return [Wanted(name) for name in OUTPUTS]
    wanted: dict[str, Wanted] = {}
    for index, tensor in enumerate(request.outputs):
        field = f"outputs[{index}]"
        if tensor.name not in OUTPUTS:
            raise InvalidArgument(
                f"{field}.name", f"the model gives the tensors {_listed(OUTPUTS)}, not {quoted(tensor.name)}"
            )
        if tensor.name in wanted:
            raise InvalidArgument(f"{field}.name", f"a tensor is asked for once, {tensor.name} is asked for twice")
        _refuse_shared_memory(field, tensor.name, tensor.parameters)
        wanted[tensor.name] = Wanted(tensor.name, _top(f"{field}.parameters", tensor))
    return list(wanted.values())


def read_timeout(request: pb.ModelInferRequest) -> float | None:
    """The request's own time limit, in seconds: its parameter `timeout`, in microseconds, 0 for none.

    Raises:
        InvalidArgument: it is no whole number, or below 0.
    """
    if "timeout" not in request.parameters:
        return None
    microseconds = _whole_number(request.parameters["timeout"])
    if microseconds is None or microseconds < 0:
        raise InvalidArgument(
            "parameters[timeout]",
            f"timeout is a whole number of microseconds, 0 or more, not {_shown(request.parameters['timeout'])}",
        )
    return microseconds / 1e6 if microseconds else None


def _rows_of_shape(name: str, shape: Sequence[int]) -> int:
    if tuple(shape[1:4]) not in ROW_SHAPES or len(shape) > 4 or shape[0] < 1:
        allowed = [f"[n, {', '.join(map(str, row))}]" for row in ROW_SHAPES]
        given = ", ".join(map(str, shape[:6])) + (", ..." if len(shape) > 6 else "")
        raise InvalidArgument(
            "inputs[0].shape",
            f"tensor {name} has the shape {', '.join(allowed[:-1])} or {allowed[-1]}, n of 1 or more, not [{given}]",
        )
    return shape[0]


def _raw(
    request: pb.ModelInferRequest, tensor: pb.ModelInferRequest.InferInputTensor, kind: Input, rows: int
) -> npt.NDArray[Any]:
    """The elements of the first entry of raw_input_contents."""
    if (entries := len(request.raw_input_contents)) != 1:
        raise InvalidArgument("raw_input_contents", f"there is one entry an input, here are {entries} for 1 input")
    if tensor.contents.ListFields():
        raise InvalidArgument(
            "inputs[0].contents", f"tensor {tensor.name} is in raw_input_contents or in contents, here it is in both"
        )
    content = request.raw_input_contents[0]
    size = rows * PIXELS * kind.dtype.itemsize
    if len(content) != size:
        raise InvalidArgument(
            "raw_input_contents[0]",
            f"tensor {tensor.name} is {kind.datatype} of {rows} rows and so has {size} bytes, here are {len(content)}",
        )
    return np.frombuffer(content, kind.dtype)


def _typed(tensor: pb.ModelInferRequest.InferInputTensor, kind: Input, rows: int) -> npt.NDArray[Any]:
    """The elements of the tensor's contents."""
    field = f"inputs[0].contents.{kind.contents}"
    if others := [found.name for found, _ in tensor.contents.ListFields() if found.name != kind.contents]:
        raise InvalidArgument(
            f"inputs[0].contents.{others[0]}", f"tensor {tensor.name} is {kind.datatype}, which is in {kind.contents}"
        )
    elements = getattr(tensor.contents, kind.contents)
    if len(elements) != rows * PIXELS:
        raise InvalidArgument(
            field, f"tensor {tensor.name} of {rows} rows has {rows * PIXELS} elements, here are {len(elements)}"
        )
    if kind.dtype != np.uint8:
        return np.array(elements, kind.dtype)
    values = np.array(elements, np.uint32)
    if (values > 255).any():
        position = int(np.argmax(values > 255))
        raise InvalidArgument(
            field, f"an element of tensor {tensor.name} is from 0 to 255, element {position} is {values[position]}"
        )
    return values.astype(np.uint8)


def _check_features(name: str, features: npt.NDArray[np.float32]) -> None:
    within = np.abs(features) <= MAX_FEATURE  # NaN is not
    if within.all():
        return
    row, column = divmod(int(np.argmin(within)), PIXELS)
    raise InvalidArgument(
        "inputs[0]",
        f"every value of tensor {name} is finite and from {-MAX_FEATURE:.0f} to {MAX_FEATURE:.0f}, "
        f"but row {row} holds {features[row, column]} at position {column}",
    )


def _refuse_shared_memory(field: str, name: str, parameters: Parameters) -> None:
    if "shared_memory_region" in parameters:
        raise InvalidArgument(
            f"{field}.parameters", f"a tensor travels in its message, but {name} is to be in a shared_memory_region"
        )


def _top(field: str, tensor: pb.ModelInferRequest.InferRequestedOutputTensor) -> int | None:
    if "classification" not in tensor.parameters:
        return None
    if not OUTPUTS[tensor.name].is_by_class:
        by_class = [name for name, output in OUTPUTS.items() if output.is_by_class]
        raise InvalidArgument(field, f"classification is for the tensors {_listed(by_class)}, not for {tensor.name}")
    top = _whole_number(tensor.parameters["classification"])
    if top is None or top < 1:
        raise InvalidArgument(
            field,
            f"classification of tensor {tensor.name} is a whole number of classes, 1 or more, "
            f"not {_shown(tensor.parameters['classification'])}",
        )
    return top


def _whole_number(parameter: pb.InferParameter) -> int | None:
    choice = parameter.WhichOneof("parameter_choice")
    return getattr(parameter, choice) if choice in ("int64_param", "uint64_param") else None


def _shown(parameter: pb.InferParameter) -> str:
    choice = parameter.WhichOneof("parameter_choice")
    return "unset" if choice is None else quoted(str(getattr(parameter, choice)))


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}"


# To a response --------------------------------------------------------------------


def write_outputs(response: pb.ModelInferResponse, wanted: Sequence[Wanted], parts: Sequence[Scores]) -> None:
    """Add the outputs that are wanted of one model's scores, which came in these parts; always in raw form."""
    labels = parts[-1].labels or DIGITS
    for want in wanted:
        output = OUTPUTS[want.name]
        values = output.values(parts[0]) if len(parts) == 1 else np.concatenate([output.values(part) for part in parts])
        if want.top is None:
            response.outputs.add(name=want.name, datatype=output.datatype, shape=values.shape)
            response.raw_output_contents.append(values.tobytes())
        else:
            top = min(want.top, len(labels))
            response.outputs.add(name=want.name, datatype="BYTES", shape=(len(values), top))
            response.raw_output_contents.append(_classes(values, top, labels))


def _classes(values: npt.NDArray[np.float32], top: int, labels: Sequence[str]) -> bytes:
    """The highest classes of each row as elements of BYTES: `value:index:label`, highest first."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :top]  # stable, so that equal ones come as in argmax
    endings = [f":{index}:{label}".encode() for index, label in enumerate(labels)]
    elements = bytearray()
    for row, classes in zip(values.tolist(), order.tolist(), strict=True):
        for index in classes:
            element = b"%f%b" % (row[index], endings[index])
            elements += struct.pack("<I", len(element)) + element
    return bytes(elements)


# What the model takes and gives ----------------------------------------------------


def metadata(
    classes: int,
) -> tuple[list[pb.ModelMetadataResponse.TensorMetadata], list[pb.ModelMetadataResponse.TensorMetadata]]:
    """Inputs and outputs of a model of so many classes, as ModelMetadata describes them."""
    kind = pb.ModelMetadataResponse.TensorMetadata
    return (
        [kind(name=name, datatype=tensor.datatype, shape=(-1, PIXELS)) for name, tensor in INPUTS.items()],
        [
            kind(name=name, datatype=tensor.datatype, shape=(-1, classes) if tensor.is_by_class else (-1,))
            for name, tensor in OUTPUTS.items()
        ],
    )


def config(classes: int) -> tuple[list[pb.ModelInput], list[pb.ModelOutput]]:
    """The same, as ModelConfig describes them: without the dimension that counts rows."""
    return (
        # Optional, as a request carries one of the two.
        [pb.ModelInput(name=n, data_type=t.config_type, dims=(PIXELS,), optional=True) for n, t in INPUTS.items()],
        # Triton has no tensor without a dimension behind the first.
        [
            pb.ModelOutput(name=n, data_type=t.config_type, dims=(classes if t.is_by_class else 1,))
            for n, t in OUTPUTS.items()
        ],
    )
