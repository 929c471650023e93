"""The Open Inference Protocol: first without a transport, then over the wire through our own stubs."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given, settings
from hypothesis import strategies as st

import server.service
from digits.checkpoint import Checkpoint, Manifest
from digits.network import ImprovedNN
from digits.preprocessing import normalize
from protos.inference import grpc_inference_service_pb2 as pb
from protos.inference import grpc_inference_service_pb2_grpc as pb_grpc
from protos.mnist.v1 import digit_classifier_pb2
from server import tensors
from server.errors import DeadlineExceeded, InvalidArgument, NotFound, NotServing, Overloaded, ServiceError
from server.inference import Classifier, Scores
from server.inputs import Rows
from server.intake import Intake
from server.observer import Observer, Observers
from server.open_inference import MAX_ID_BYTES, SERVICE_NAME, OpenInference
from server.open_inference_servicer import OpenInferenceServicer, add_to_server
from server.service import DigitService
from server.settings import Settings
from server.statistics import Statistics

pytestmark = pytest.mark.usefixtures("no_stray_errors")

TIMEOUT = 30
PIXELS = np.random.default_rng(0).integers(0, 256, (300, 784), np.uint8)
VERSION = "0123456789ab"
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
METHODS = {
    "ServerLive": pb.ServerLiveRequest(),
    "ServerReady": pb.ServerReadyRequest(),
    "ModelReady": pb.ModelReadyRequest(name="mnist"),
    "ServerMetadata": pb.ServerMetadataRequest(),
    "ModelMetadata": pb.ModelMetadataRequest(name="mnist"),
    "ModelConfig": pb.ModelConfigRequest(name="mnist"),
    "ModelStatistics": pb.ModelStatisticsRequest(name="mnist"),
    "ModelInfer": pb.ModelInferRequest(model_name="mnist"),
    "ModelStreamInfer": pb.ModelInferRequest(model_name="mnist"),
}


class Model(Classifier):
    """An untrained network that remembers the rows of its batches and waits to be let go when held."""

    def __init__(self, *, held: bool = False, version: str = VERSION, labels: tuple[str, ...] = LABELS) -> None:
        torch.manual_seed(0)
        super().__init__(Checkpoint(ImprovedNN(len(labels)), Manifest(labels=labels), version + 52 * "0"))
        self.batches: list[int] = []
        self.held = held
        self._begun = threading.Semaphore(0)
        self._go = threading.Semaphore(0)

    def run_batch(self, blocks: Sequence[Rows]) -> list[Scores]:
        self.batches.append(sum(len(block) for block in blocks))
        self._begun.release()
        if self.held:
            assert self._go.acquire(timeout=TIMEOUT), "nobody let the model go"
        return super().run_batch(blocks)

    async def begun(self) -> None:
        """Wait until one more batch has begun."""
        assert await asyncio.to_thread(self._begun.acquire, timeout=TIMEOUT)

    def let_go(self, batches: int = 1) -> None:
        self._go.release(batches)


@pytest.fixture
def held_model(monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model whose batches all run in the thread, each until it is let go."""
    monkeypatch.setattr(server.service, "INLINE_SIZE", 0)
    return Model(held=True)


class Calls(Observer):
    """What was told of calls and streams."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, str]] = []
        self.streams = 0

    def call_ended(self, method: str, code: str, seconds: float) -> None:
        self.ended.append((method, code))

    def stream_opened(self) -> None:
        self.streams += 1

    def stream_closed(self) -> None:
        self.streams -= 1


@dataclass
class Served:
    service: DigitService
    core: OpenInference
    calls: Calls


@asynccontextmanager
async def serving(model: Model | None, **settings: Any) -> AsyncIterator[Served]:
    chosen, statistics, calls = Settings(**settings), Statistics(), Calls()
    async with DigitService(chosen, Observers([statistics, calls])) as service:
        if model is not None:
            service.serve_model(model)
        yield Served(service, OpenInference(service, chosen, statistics, lambda: model is not None), calls)


def raw(rows: npt.NDArray[Any], shape: Sequence[int] = (784,), **fields: Any) -> pb.ModelInferRequest:
    """A request that holds pixels or features in raw form."""
    request = pb.ModelInferRequest(model_name="mnist", raw_input_contents=[rows.tobytes()], **fields)
    request.inputs.append(tensor_of(rows, shape))
    return request


def typed(rows: npt.NDArray[Any], shape: Sequence[int] = (784,), **fields: Any) -> pb.ModelInferRequest:
    """The same in typed form."""
    request = pb.ModelInferRequest(model_name="mnist", **fields)
    request.inputs.append(tensor_of(rows, shape))
    field = "uint_contents" if rows.dtype == np.uint8 else "fp32_contents"
    getattr(request.inputs[0].contents, field).extend(rows.ravel().tolist())
    return request


def tensor_of(rows: npt.NDArray[Any], shape: Sequence[int]) -> pb.ModelInferRequest.InferInputTensor:
    name, datatype = ("pixels", "UINT8") if rows.dtype == np.uint8 else ("features", "FP32")
    return pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=(len(rows), *shape))


def asking(*names: str, classification: int | None = None) -> pb.ModelInferRequest:
    """A request of three rows for these outputs."""
    request = raw(PIXELS[:3])
    for name in names:
        output = request.outputs.add(name=name)
        if classification is not None:
            output.parameters["classification"].int64_param = classification
    return request


def outputs_of(response: pb.ModelInferResponse) -> dict[str, npt.NDArray[Any]]:
    """The outputs by name, each as its datatype and shape say."""
    assert len(response.outputs) == len(response.raw_output_contents)
    outputs: dict[str, npt.NDArray[Any]] = {}
    for output, content in zip(response.outputs, response.raw_output_contents, strict=True):
        assert not output.HasField("contents")
        if output.datatype == "BYTES":
            outputs[output.name] = np.array(elements_of(content)).reshape(output.shape)
        else:
            outputs[output.name] = np.frombuffer(content, {"INT64": "<i8", "FP32": "<f4"}[output.datatype]).reshape(
                output.shape
            )
    return outputs


def elements_of(content: bytes) -> list[str]:
    elements = []
    while content:
        (length,) = struct.unpack_from("<I", content)
        elements.append(content[4 : 4 + length].decode())
        content = content[4 + length :]
    return elements


def check_rows(response: pb.ModelInferResponse, rows: npt.NDArray[np.uint8]) -> None:
    """The response answers these pixels, in order, with all outputs."""
    expected = Model().predict(rows)
    outputs = outputs_of(response)
    assert list(outputs) == ["digit", "probabilities", "logits", "digit_score"]
    assert outputs["digit"].tolist() == expected.digits.tolist()
    np.testing.assert_allclose(outputs["probabilities"], expected.probabilities, atol=1e-5)
    np.testing.assert_allclose(outputs["logits"], expected.logits, atol=1e-4)
    assert outputs["digit_score"].shape == (len(rows),)
    np.testing.assert_allclose(outputs["digit_score"], expected.digit_scores, atol=1e-4)


# What is answered -------------------------------------------------------------------


@pytest.mark.parametrize("build", [raw, typed])
@pytest.mark.parametrize("shape", [(784,), (28, 28), (1, 28, 28)])
@pytest.mark.parametrize("name", ["pixels", "features"])
async def test_every_form_and_shape_is_read_alike(
    build: Callable[..., pb.ModelInferRequest], shape: tuple[int, ...], name: str
) -> None:
    rows = PIXELS[:5] if name == "pixels" else normalize(PIXELS[:5])
    async with serving(Model()) as served:
        check_rows(await served.core.model_infer(build(rows, shape)), PIXELS[:5])


async def test_the_answer_names_the_model_its_version_and_the_requests_id() -> None:
    async with serving(Model()) as served:
        response = await served.core.model_infer(raw(PIXELS[:1], id="a frame"))
        assert (response.model_name, response.model_version, response.id) == ("mnist", VERSION, "a frame")
        assert (await served.core.model_infer(raw(PIXELS[:1], model_version=VERSION))).id == ""


async def test_outputs_are_answered_in_the_order_in_which_they_are_asked_for() -> None:
    async with serving(Model()) as served:
        response = await served.core.model_infer(asking("logits", "digit"))
        assert [(o.name, o.datatype, list(o.shape)) for o in response.outputs] == [
            ("logits", "FP32", [3, 10]),
            ("digit", "INT64", [3]),
        ]
        outputs = outputs_of(response)
        assert outputs["digit"].tolist() == outputs["logits"].argmax(axis=1).tolist()


@pytest.mark.parametrize("name", ["probabilities", "logits"])
async def test_classification_gives_the_highest_classes_as_value_index_and_label(name: str) -> None:
    async with serving(Model()) as served:
        response = await served.core.model_infer(asking(name, classification=3))
        values = outputs_of(await served.core.model_infer(asking(name)))[name]
    assert (response.outputs[0].datatype, list(response.outputs[0].shape)) == ("BYTES", [3, 3])
    for row, expected in zip(outputs_of(response)[name], values, strict=True):
        for element, index in zip(row.tolist(), np.argsort(-expected)[:3].tolist(), strict=True):
            assert element == f"{expected[index]:f}:{index}:{LABELS[index]}"


async def test_there_are_ten_classes_however_many_are_asked_for() -> None:
    async with serving(Model()) as served:
        response = await served.core.model_infer(asking("probabilities", classification=1000))
        assert list(response.outputs[0].shape) == [3, 10]
        assert len(elements_of(response.raw_output_contents[0])) == 30


async def test_of_letters_there_are_twenty_six() -> None:
    model = Model(labels=LETTERS)
    async with serving(model) as served:
        response = await served.core.model_infer(asking("probabilities", classification=1000))
        every = outputs_of(await served.core.model_infer(raw(PIXELS[:3])))
        about = served.core.model_metadata(pb.ModelMetadataRequest(name="mnist"))
        config = served.core.model_config(pb.ModelConfigRequest(name="mnist")).config
    expected = model.predict(PIXELS[:3])
    assert list(response.outputs[0].shape) == [3, 26]
    for row, values in zip(outputs_of(response)["probabilities"], expected.probabilities, strict=True):
        order = np.argsort(-values).tolist()
        assert [element.split(":")[1:] for element in row.tolist()] == [[str(i), LETTERS[i]] for i in order]
    assert {name: output.shape for name, output in every.items()} == {
        "digit": (3,),
        "probabilities": (3, 26),
        "logits": (3, 26),
        "digit_score": (3,),
    }
    np.testing.assert_allclose(every["logits"], expected.logits, atol=1e-4)
    assert every["digit"].tolist() == expected.digits.tolist()
    assert {t.name: list(t.shape) for t in about.outputs} == {
        "digit": [-1],
        "probabilities": [-1, 26],
        "logits": [-1, 26],
        "digit_score": [-1],
    }
    assert [list(t.dims) for t in config.output] == [[1], [26], [26], [1]]


async def test_labels_are_those_of_digits_where_the_model_says_nothing_else() -> None:
    async with serving(Model(labels=tuple("0123456789"))) as served:
        response = await served.core.model_infer(asking("logits", classification=10))
    for row in outputs_of(response)["logits"].tolist():
        assert sorted(element.split(":")[1:] for element in row) == [[digit, digit] for digit in "0123456789"]


async def test_a_request_larger_than_a_batch_is_split_and_put_together_again() -> None:
    model = Model()
    async with serving(model, max_batch_size=64) as served:
        check_rows(await served.core.model_infer(raw(PIXELS)), PIXELS)
        classes = raw(PIXELS)
        classes.outputs.add(name="probabilities").parameters["classification"].int64_param = 1
        response = await served.core.model_infer(classes)
        assert len(elements_of(response.raw_output_contents[0])) == 300
    assert model.batches == [64, 64, 64, 64, 44] * 2


async def test_requests_of_both_contracts_are_computed_in_one_batch(held_model: Model) -> None:
    async with serving(held_model) as served:
        first = asyncio.create_task(served.core.model_infer(raw(PIXELS[:1])))
        await held_model.begun()
        inferred = asyncio.create_task(served.core.model_infer(raw(PIXELS[1:4])))
        ours = digit_classifier_pb2.ClassifyRequest(pixels=PIXELS[4:6].tobytes())
        classified = asyncio.create_task(served.service.classify(ours))
        held_model.let_go()
        await held_model.begun()
        held_model.let_go()
        check_rows(await first, PIXELS[:1])
        check_rows(await inferred, PIXELS[1:4])
        assert list((await classified).digits) == Model().predict(PIXELS[4:6]).digits.tolist()
    assert held_model.batches == [1, 5]


# What is refused --------------------------------------------------------------------


def changed(request: pb.ModelInferRequest, change: Callable[[pb.ModelInferRequest], object]) -> pb.ModelInferRequest:
    change(request)
    return request


def with_value(value: float) -> pb.ModelInferRequest:
    features = normalize(PIXELS[:2])
    features[1, 5] = value
    return raw(features)


def bad_requests() -> dict[str, tuple[pb.ModelInferRequest, str, str]]:
    one = PIXELS[:1]
    shared_output = asking("digit")
    shared_output.outputs[0].parameters["shared_memory_region"].string_param = "here"
    shared_input = changed(raw(one), lambda r: r.ClearField("raw_input_contents"))
    shared_input.inputs[0].parameters["shared_memory_region"].string_param = "here"
    class_name = asking("probabilities")
    class_name.outputs[0].parameters["classification"].string_param = "three"
    own_timeout = raw(one)
    own_timeout.parameters["timeout"].int64_param = -1
    text_timeout = raw(one)
    text_timeout.parameters["timeout"].string_param = "1 s"
    too_bright = typed(one)
    too_bright.inputs[0].contents.uint_contents[7] = 256
    mixed = typed(one)
    mixed.inputs[0].contents.fp32_contents.append(1)
    a_list = "exactly one of the tensors pixels and features"
    shapes = "tensor pixels has the shape [n, 784], [n, 28, 28] or [n, 1, 28, 28], n of 1 or more, not "
    return {
        "no input": (pb.ModelInferRequest(model_name="mnist"), "inputs", f"{a_list}, this one carries 0"),
        "both inputs": (
            changed(raw(one), lambda r: r.inputs.append(tensor_of(normalize(one), (784,)))),
            "inputs",
            f"{a_list}, this one carries 2: 'pixels', 'features'",
        ),
        "unknown input": (
            changed(raw(one), lambda r: setattr(r.inputs[0], "name", "image")),
            "inputs[0].name",
            "one of the tensors pixels and features, not 'image'",
        ),
        "a name without end": (
            changed(raw(one), lambda r: setattr(r.inputs[0], "name", "x" * 100_000)),
            "inputs[0].name",
            f"not '{'x' * 40}...'",
        ),
        "wrong datatype": (
            changed(raw(one), lambda r: setattr(r.inputs[0], "datatype", "FP32")),
            "inputs[0].datatype",
            "tensor pixels is UINT8, not 'FP32'",
        ),
        "no shape": (changed(raw(one), lambda r: r.inputs[0].ClearField("shape")), "inputs[0].shape", f"{shapes}[]"),
        "no rows dimension": (
            changed(raw(one), lambda r: r.inputs[0].shape.__delitem__(0)),
            "inputs[0].shape",
            f"{shapes}[784]",
        ),
        "no rows": (raw(one[:0]), "inputs[0].shape", f"{shapes}[0, 784]"),
        "a negative number of rows": (
            changed(raw(one), lambda r: r.inputs[0].shape.__setitem__(0, -1)),
            "inputs[0].shape",
            f"{shapes}[-1, 784]",
        ),
        "wrong row": (raw(one[:, :783], (783,)), "inputs[0].shape", f"{shapes}[1, 783]"),
        "transposed": (raw(one, (28, 28, 1)), "inputs[0].shape", f"{shapes}[1, 28, 28, 1]"),
        "dimensions without end": (
            raw(one, (1, 28, 28) + (1,) * 1000),
            "inputs[0].shape",
            f"{shapes}[1, 1, 28, 28, 1, 1, ...]",
        ),
        "too many rows": (
            changed(raw(one), lambda r: r.inputs[0].shape.__setitem__(0, 2**62)),
            "inputs[0].shape",
            f"tensor pixels has at most 200 rows a request, this one has {2**62}",
        ),
        "too many bytes": (
            raw(normalize(PIXELS[:100])),
            "inputs[0].shape",
            "tensor features has at most 300000 bytes a request, this one has 313600 in 100 rows",
        ),
        "raw bytes missing": (
            changed(raw(one), lambda r: r.raw_input_contents.__setitem__(0, bytes(783))),
            "raw_input_contents[0]",
            "tensor pixels is UINT8 of 1 rows and so has 784 bytes, here are 783",
        ),
        "raw entries too many": (
            changed(raw(one), lambda r: r.raw_input_contents.append(b"")),
            "raw_input_contents",
            "one entry an input, here are 2 for 1 input",
        ),
        "raw and typed": (
            changed(typed(one), lambda r: r.raw_input_contents.append(one.tobytes())),
            "inputs[0].contents",
            "tensor pixels is in raw_input_contents or in contents, here it is in both",
        ),
        "neither raw nor typed": (
            changed(raw(one), lambda r: r.ClearField("raw_input_contents")),
            "inputs[0].contents.uint_contents",
            "tensor pixels of 1 rows has 784 elements, here are 0",
        ),
        "typed elements missing": (
            changed(typed(normalize(one)), lambda r: r.inputs[0].contents.fp32_contents.pop()),
            "inputs[0].contents.fp32_contents",
            "tensor features of 1 rows has 784 elements, here are 783",
        ),
        "typed in another field": (
            mixed,
            "inputs[0].contents.fp32_contents",
            "tensor pixels is UINT8, which is in uint_contents",
        ),
        "typed out of range": (
            too_bright,
            "inputs[0].contents.uint_contents",
            "an element of tensor pixels is from 0 to 255, element 7 is 256",
        ),
        "not a number": (with_value(np.nan), "inputs[0]", "tensor features is finite and from -1000000 to 1000000"),
        "infinite": (with_value(-np.inf), "inputs[0]", "but row 1 holds -inf at position 5"),
        "huge": (with_value(2e6), "inputs[0]", "but row 1 holds 2000000.0 at position 5"),
        "shared memory in": (shared_input, "inputs[0].parameters", "pixels is to be in a shared_memory_region"),
        "shared memory out": (shared_output, "outputs[0].parameters", "digit is to be in a shared_memory_region"),
        "unknown output": (
            asking("digit", "label"),
            "outputs[1].name",
            "the tensors digit, probabilities, logits and digit_score, not 'label'",
        ),
        "output twice": (asking("digit", "logits", "digit"), "outputs[2].name", "digit is asked for twice"),
        "classes of the digit": (
            asking("digit", classification=1),
            "outputs[0].parameters",
            "for the tensors probabilities and logits, not for digit",
        ),
        "classes of the digit score": (
            asking("digit_score", classification=1),
            "outputs[0].parameters",
            "for the tensors probabilities and logits, not for digit_score",
        ),
        "no classes": (
            asking("logits", classification=0),
            "outputs[0].parameters",
            "a whole number of classes, 1 or more, not '0'",
        ),
        "classes in words": (class_name, "outputs[0].parameters", "1 or more, not 'three'"),
        "time below none": (own_timeout, "parameters[timeout]", "microseconds, 0 or more, not '-1'"),
        "time in words": (text_timeout, "parameters[timeout]", "a whole number of microseconds, 0 or more, not '1 s'"),
        "an id without end": (raw(one, id="x" * 5000), "id", f"at most {MAX_ID_BYTES} characters, this one has 5000"),
    }


@pytest.mark.parametrize("name", list(bad_requests()))
async def test_a_bad_tensor_is_refused_with_its_name_the_rule_and_the_value(name: str) -> None:
    request, field, words = bad_requests()[name]
    model = Model()
    async with serving(model, max_queue_size=200, max_message_bytes=300_000) as served:
        with pytest.raises(InvalidArgument) as error:
            await served.core.model_infer(request)
        assert served.calls.ended == [(f"{SERVICE_NAME}/ModelInfer", "INVALID_ARGUMENT")]
    assert error.value.field == field
    assert str(error.value).startswith(f"{field}: ")
    assert words in str(error.value)
    assert len(str(error.value)) < 400
    assert model.batches == []


numbers = st.one_of(st.integers(-2, 3), st.sampled_from([28, 784, 783, -(2**63), 2**63 - 1]))
parameters = st.dictionaries(
    st.sampled_from(["classification", "timeout", "shared_memory_region", "priority"]),
    st.one_of(
        st.builds(pb.InferParameter, int64_param=st.integers(-1, 12)),
        st.builds(pb.InferParameter, uint64_param=st.integers(0, 2**64 - 1)),
        st.builds(pb.InferParameter, double_param=st.floats()),
        st.builds(pb.InferParameter, bool_param=st.booleans()),
        st.builds(pb.InferParameter, string_param=st.sampled_from(["", "1", "x"])),
        st.builds(pb.InferParameter),
    ),
)
contents = st.builds(
    pb.InferTensorContents,
    uint_contents=st.sampled_from([[], [1], [255] * 784, [256] * 784]),
    fp32_contents=st.sampled_from([[], [0.5], [0.5] * 784, [float("nan")] * 784]),
    bytes_contents=st.sampled_from([[], [b"x"]]),
)
requests = st.builds(
    pb.ModelInferRequest,
    parameters=parameters,
    inputs=st.lists(
        st.builds(
            pb.ModelInferRequest.InferInputTensor,
            name=st.sampled_from(["pixels", "features", "", "x"]),
            datatype=st.sampled_from(["UINT8", "FP32", "BYTES"]),
            shape=st.one_of(st.sampled_from([[1, 784], [1, 28, 28], [1, 1, 28, 28]]), st.lists(numbers, max_size=5)),
            parameters=parameters,
            contents=st.one_of(st.none(), contents),
        ),
        max_size=2,
    ),
    outputs=st.lists(
        st.builds(
            pb.ModelInferRequest.InferRequestedOutputTensor,
            name=st.sampled_from(["digit", "probabilities", "logits", "x"]),
            parameters=parameters,
        ),
        max_size=3,
    ),
    raw_input_contents=st.lists(st.sampled_from([b"", bytes(784), bytes(3136), b"\xff" * 3136]), max_size=2),
)


@given(requests)
@settings(deadline=None)
def test_any_request_is_read_or_refused(request: pb.ModelInferRequest) -> None:
    assert tensors.count_rows(request) >= 1
    assert tensors.count_bytes(request) >= 0
    try:
        wanted = tensors.read_wanted(request)
        timeout = tensors.read_timeout(request)
        rows = tensors.read_rows(request, max_rows=10, max_bytes=100_000)
    except InvalidArgument:
        return
    assert wanted
    assert timeout is None or timeout > 0
    assert rows.shape == (request.inputs[0].shape[0], 784)
    assert str(rows.dtype) == {"pixels": "uint8", "features": "float32"}[request.inputs[0].name]
    assert np.isfinite(rows).all()


@pytest.mark.parametrize(("microseconds", "seconds"), [(0, None), (1, 1e-6), (2_500_000, 2.5)])
def test_a_timeout_is_in_microseconds_and_0_is_none(microseconds: int, seconds: float | None) -> None:
    for choice in ("int64_param", "uint64_param"):
        request = pb.ModelInferRequest(parameters={"timeout": pb.InferParameter(**{choice: microseconds})})  # type: ignore[arg-type]
        assert tensors.read_timeout(request) == seconds
    assert tensors.read_timeout(pb.ModelInferRequest()) is None


async def test_another_model_or_version_is_not_found() -> None:
    async with serving(Model()) as served:
        core = served.core
        for call in (
            lambda name, version: core.model_ready(pb.ModelReadyRequest(name=name, version=version)),
            lambda name, version: core.model_metadata(pb.ModelMetadataRequest(name=name, version=version)),
            lambda name, version: core.model_config(pb.ModelConfigRequest(name=name, version=version)),
            lambda name, version: core.model_statistics(pb.ModelStatisticsRequest(name=name, version=version)),
        ):
            call("mnist", "")
            call("mnist", VERSION)
            with pytest.raises(NotFound, match="the model here is 'mnist', not 'chess'"):
                call("chess", "")
            with pytest.raises(NotFound, match=f"version '{VERSION}' of model 'mnist' is served, not '1'"):
                call("mnist", "1")
        with pytest.raises(NotFound, match="not ''"):
            await core.model_infer(pb.ModelInferRequest())
        with pytest.raises(NotFound, match="not '1'"):
            await core.model_infer(raw(PIXELS[:1], model_version="1"))
        assert served.calls.ended[-1] == (f"{SERVICE_NAME}/ModelInfer", "NOT_FOUND")


async def test_a_version_that_was_exchanged_while_the_request_waited_is_not_found(held_model: Model) -> None:
    async with serving(held_model) as served:
        first = asyncio.create_task(served.core.model_infer(raw(PIXELS[:1])))
        await held_model.begun()
        named = asyncio.create_task(served.core.model_infer(raw(PIXELS[:1], model_version=VERSION)))
        unnamed = asyncio.create_task(served.core.model_infer(raw(PIXELS[:1])))
        await asyncio.sleep(0)  # both are in the queue
        served.service.serve_model(Model(version="ba9876543210"))
        held_model.let_go()
        assert (await first).model_version == VERSION
        assert (await unnamed).model_version == "ba9876543210"
        with pytest.raises(NotFound, match=f"version 'ba9876543210' .* not '{VERSION}'"):
            await named


@pytest.mark.parametrize(("before", "after"), [(LABELS, LETTERS), (LETTERS, LABELS)], ids=["more", "fewer"])
async def test_labels_are_those_of_the_model_that_computed_it_whatever_was_served_before(
    before: tuple[str, ...], after: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.service, "INLINE_SIZE", 0)
    held, other = Model(held=True, labels=before), Model(version="ba9876543210", labels=after)
    async with serving(held) as served:
        first = asyncio.create_task(served.core.model_infer(asking("logits", classification=100)))
        await held.begun()
        second = asyncio.create_task(served.core.model_infer(asking("logits", classification=100)))
        await asyncio.sleep(0)  # it is in the queue
        served.service.serve_model(other)
        held.let_go()
        for model, labels, response in ((held, before, await first), (other, after, await second)):
            assert response.model_version == model.checkpoint.version
            assert list(response.outputs[0].shape) == [3, len(labels)]
            order = np.argsort(-model.predict(PIXELS[:3]).logits, axis=1).tolist()
            told = [[element.split(":")[2] for element in row] for row in outputs_of(response)["logits"].tolist()]
            assert told == [[labels[index] for index in row] for row in order]


async def test_before_the_model_is_loaded_the_server_is_live_and_not_ready() -> None:
    async with serving(None) as served:
        assert served.core.server_live(pb.ServerLiveRequest()).live
        assert not served.core.server_ready(pb.ServerReadyRequest()).ready
        assert not served.core.model_ready(pb.ModelReadyRequest(name="mnist")).ready
        with pytest.raises(NotFound):
            served.core.model_ready(pb.ModelReadyRequest(name="chess"))
        with pytest.raises(NotServing, match="not loaded yet"):
            served.core.model_metadata(pb.ModelMetadataRequest(name="mnist"))
        with pytest.raises(NotServing, match="not loaded yet"):
            await served.core.model_infer(raw(PIXELS[:1]))
        with pytest.raises(NotServing, match="not loaded yet"):
            await served.core.model_stream_infer(Conversation(served).read, Conversation(served).write)


@pytest.mark.parametrize("own", [True, False])
async def test_a_request_whose_time_is_over_is_not_computed(own: bool, held_model: Model) -> None:
    async with serving(held_model) as served:
        first = asyncio.create_task(served.core.model_infer(raw(PIXELS[:1])))
        await held_model.begun()
        request = raw(PIXELS[:2])
        request.parameters["timeout"].int64_param = 1 if own else 10**9
        late = asyncio.create_task(served.core.model_infer(request, None if own else 1e-6))
        await asyncio.sleep(0)  # it is in the queue
        held_model.let_go()
        await first
        with pytest.raises(DeadlineExceeded):
            await late
    assert held_model.batches == [1]


async def test_a_full_queue_refuses_with_a_hint_when_to_try_again(held_model: Model) -> None:
    async with serving(held_model, max_queue_size=2) as served:
        calls = [asyncio.create_task(served.core.model_infer(raw(PIXELS[:1])))]
        await held_model.begun()
        calls.append(asyncio.create_task(served.core.model_infer(raw(PIXELS[:2]))))
        await asyncio.sleep(0)  # it is in the queue
        with pytest.raises(Overloaded) as error:
            await served.core.model_infer(raw(PIXELS[:1]))
        assert error.value.retry_after_seconds
        held_model.let_go(2)
        await asyncio.gather(*calls)


# Statistics -------------------------------------------------------------------------


async def test_statistics_count_rows_batches_and_failures_since_the_model_is_served() -> None:
    model = Model()
    async with serving(model, max_batch_size=64) as served:

        def statistics() -> pb.ModelStatistics:
            (answer,) = served.core.model_statistics(pb.ModelStatisticsRequest()).model_stats
            return answer

        assert statistics() == pb.ModelStatistics(
            name="mnist", version=VERSION, inference_stats=statistics().inference_stats
        )
        for rows in (3, 3, 100):
            await served.core.model_infer(raw(PIXELS[:rows]))
        counted = statistics()
        assert (counted.inference_count, counted.execution_count) == (106, 4)
        assert [(batch.batch_size, batch.compute_infer.count) for batch in counted.batch_stats] == [
            (3, 2),
            (36, 1),
            (64, 1),
        ]
        assert (counted.inference_stats.success.count, counted.inference_stats.fail.count) == (4, 0)
        assert counted.inference_stats.success.ns >= counted.inference_stats.compute_infer.ns > 0
        assert counted.last_inference > 1_600_000_000_000
        late = raw(PIXELS[:1])
        with pytest.raises(DeadlineExceeded):
            await served.core.model_infer(late, -1.0)
        assert statistics().inference_stats.fail.count == 1
        served.service.serve_model(Model(version="ba9876543210"))
        assert (statistics().version, statistics().execution_count) == ("ba9876543210", 0)


# Streams ----------------------------------------------------------------------------


class Conversation:
    """The far end of a stream: what it sends, and what it has got."""

    def __init__(self, served: Served) -> None:
        self.answers: list[pb.ModelStreamInferResponse] = []
        self.reads = 0
        self.reading = asyncio.Event()
        self.reading.set()
        self._served = served
        self._requests: asyncio.Queue[pb.ModelInferRequest | ServiceError | None] = asyncio.Queue()
        self._waiting = asyncio.Event()

    def send(self, *requests: pb.ModelInferRequest | ServiceError | None) -> None:
        for request in requests:
            self._requests.put_nowait(request)
        self._waiting.clear()

    def start(self) -> asyncio.Task[None]:
        return asyncio.create_task(self._served.core.model_stream_infer(self.read, self.write))

    async def all_read(self) -> None:
        """Wait until the server has taken all that was sent and asks for more."""
        await asyncio.wait_for(self._waiting.wait(), TIMEOUT)

    async def read(self) -> pb.ModelInferRequest | None:
        if self._requests.empty():
            self._waiting.set()
        request = await self._requests.get()
        self.reads += 1
        if isinstance(request, ServiceError):
            raise request
        return request

    async def write(self, response: pb.ModelStreamInferResponse) -> None:
        await self.reading.wait()
        self.answers.append(response)

    def ids(self) -> list[str]:
        return [answer.infer_response.id for answer in self.answers]


async def turns(number: int = 50) -> None:
    """Let the event loop turn until nothing that can go on has not."""
    for _ in range(number):
        await asyncio.sleep(0)


async def test_a_stream_computes_together_what_came_together_and_answers_in_order(held_model: Model) -> None:
    async with serving(held_model) as served:
        conversation = Conversation(served)
        stream = conversation.start()
        for index in range(100):
            conversation.send(raw(PIXELS[index : index + 1], id=str(index)))
        await held_model.begun()
        await conversation.all_read()
        assert served.calls.streams == 1
        held_model.let_go(100)
        conversation.send(None)
        await asyncio.wait_for(stream, TIMEOUT)
        assert conversation.ids() == [str(index) for index in range(100)]
        for index, answer in enumerate(conversation.answers):
            check_rows(answer.infer_response, PIXELS[index : index + 1])
        assert served.calls.streams == 0
        assert served.calls.ended == [(f"{SERVICE_NAME}/ModelStreamInfer", "OK")]
    assert sum(held_model.batches) == 100
    assert len(held_model.batches) <= 3


async def test_many_requests_of_a_stream_do_not_crowd_out_another_caller(held_model: Model) -> None:
    async with serving(held_model, max_batch_size=4) as served:
        conversation = Conversation(served)
        stream = conversation.start()
        conversation.send(raw(PIXELS[:1]))
        await held_model.begun()
        conversation.send(*(raw(PIXELS[:1]) for _ in range(100)))
        await conversation.all_read()
        other = asyncio.create_task(served.core.model_infer(raw(PIXELS[:1])))
        await turns()
        held_model.let_go(12)  # 49 rows at most: in the order of arrival, it would be the 102nd
        await asyncio.wait_for(other, TIMEOUT)
        held_model.let_go(100)
        conversation.send(None)
        await asyncio.wait_for(stream, TIMEOUT)
        assert len(conversation.answers) == 101


async def test_a_bad_request_of_a_stream_is_answered_in_its_place() -> None:
    async with serving(Model()) as served:
        conversation = Conversation(served)
        conversation.send(
            raw(PIXELS[:1], id="a"),
            raw(PIXELS[:1, :783], (783,), id="b"),
            raw(PIXELS[:1], id="c" * 5000),
            pb.ModelInferRequest(model_name="chess", id="d"),
            raw(PIXELS[1:2], id="e"),
            None,
        )
        await asyncio.wait_for(conversation.start(), TIMEOUT)
        assert conversation.ids() == ["a", "b", "", "d", "e"]
        errors = [answer.error_message for answer in conversation.answers]
        assert errors[0] == errors[4] == ""
        assert errors[1].startswith("INVALID_ARGUMENT: inputs[0].shape: tensor pixels has the shape ")
        assert errors[2].startswith("INVALID_ARGUMENT: id: ")
        assert errors[3] == "NOT_FOUND: the model here is 'mnist', not 'chess'"
        check_rows(conversation.answers[4].infer_response, PIXELS[1:2])


@pytest.mark.parametrize("limit", ["rows", "bytes"])
async def test_a_stream_that_is_not_read_is_not_read_from_either(limit: str) -> None:
    settings = {"stream_window": 8} if limit == "rows" else {"max_message_bytes": 2 * 784}
    async with serving(Model(), **settings) as served:
        conversation = Conversation(served)
        conversation.reading.clear()
        stream = conversation.start()
        rows = 4 if limit == "rows" else 2
        for index in range(20):
            conversation.send(raw(PIXELS[:rows], id=str(index)))
        conversation.send(None)
        await turns()
        assert conversation.reads == 3  # two fill the window, and the third waits for room
        conversation.reading.set()
        await asyncio.wait_for(stream, TIMEOUT)
        assert conversation.ids() == [str(index) for index in range(20)]
        assert not any(answer.error_message for answer in conversation.answers)


async def test_a_request_larger_than_the_window_goes_alone() -> None:
    async with serving(Model(), stream_window=2) as served:
        conversation = Conversation(served)
        conversation.send(raw(PIXELS[:1]), raw(PIXELS[:100]), raw(PIXELS[:1]), None)
        await asyncio.wait_for(conversation.start(), TIMEOUT)
        assert [answer.infer_response.outputs[0].shape[0] for answer in conversation.answers] == [1, 100, 1]


async def test_a_drained_stream_answers_what_it_has_and_ends(held_model: Model) -> None:
    async with serving(held_model) as served:
        conversation = Conversation(served)
        stream = conversation.start()
        conversation.send(raw(PIXELS[:1], id="a"))
        await held_model.begun()
        await conversation.all_read()
        served.service.drain()
        conversation.send(raw(PIXELS[:1], id="b"))
        held_model.let_go(2)
        with pytest.raises(NotServing, match="about to stop"):
            await asyncio.wait_for(stream, TIMEOUT)
        assert conversation.ids() == ["a"]
        with pytest.raises(NotServing, match="about to stop"):
            await Conversation(served).start()
    assert held_model.batches == [1]


async def test_bytes_that_are_no_message_end_a_stream_behind_its_answers() -> None:
    async with serving(Model()) as served:
        conversation = Conversation(served)
        conversation.send(raw(PIXELS[:1], id="a"), InvalidArgument("request", "these bytes are none"))
        with pytest.raises(InvalidArgument, match="these bytes are none"):
            await asyncio.wait_for(conversation.start(), TIMEOUT)
        assert conversation.ids() == ["a"]


async def test_what_a_cancelled_stream_had_in_the_queue_is_not_computed(held_model: Model) -> None:
    async with serving(held_model) as served:
        conversation = Conversation(served)
        stream = conversation.start()
        conversation.send(raw(PIXELS[:1]))
        await held_model.begun()
        conversation.send(raw(PIXELS[:10]), raw(PIXELS[:10]))
        await conversation.all_read()
        await turns()
        stream.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stream
        assert served.calls.ended == [(f"{SERVICE_NAME}/ModelStreamInfer", "CANCELLED")]
        held_model.let_go(2)
        check_rows(await served.core.model_infer(raw(PIXELS[:3])), PIXELS[:3])
    assert held_model.batches == [1, 3]


# Over the wire ----------------------------------------------------------------------


@asynccontextmanager
async def listening(model: Model | None, **settings: Any) -> AsyncIterator[tuple[Served, grpc.aio.Channel]]:
    async with serving(model, **settings) as served:
        grpc_server = grpc.aio.server()
        add_to_server(OpenInferenceServicer(served.core, Intake(served.service)), grpc_server)
        port = grpc_server.add_insecure_port("127.0.0.1:0")
        await grpc_server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield served, channel
        await grpc_server.stop(grace=0)


def stub_at(channel: grpc.aio.Channel) -> Any:
    return pb_grpc.GRPCInferenceServiceStub(channel)


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


async def test_all_methods_answer_over_the_wire() -> None:
    async with listening(Model(), max_wait_ms=1.5, max_batch_size=64) as (_, channel):
        stub = stub_at(channel)
        assert (await stub.ServerLive(pb.ServerLiveRequest(), timeout=TIMEOUT)).live
        assert (await stub.ServerReady(pb.ServerReadyRequest(), timeout=TIMEOUT)).ready
        assert (await stub.ModelReady(pb.ModelReadyRequest(name="mnist"), timeout=TIMEOUT)).ready
        about = await stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=TIMEOUT)
        assert about.name == "mnist-grpc"
        assert about.version
        assert list(about.extensions) == ["classification", "model_configuration", "statistics"]
        model = await stub.ModelMetadata(pb.ModelMetadataRequest(name="mnist"), timeout=TIMEOUT)
        assert (model.name, list(model.versions), model.platform) == ("mnist", [VERSION], "pytorch_state_dict")
        assert [(t.name, t.datatype, list(t.shape)) for t in (*model.inputs, *model.outputs)] == [
            ("pixels", "UINT8", [-1, 784]),
            ("features", "FP32", [-1, 784]),
            ("digit", "INT64", [-1]),
            ("probabilities", "FP32", [-1, 10]),
            ("logits", "FP32", [-1, 10]),
            ("digit_score", "FP32", [-1]),
        ]
        config = (await stub.ModelConfig(pb.ModelConfigRequest(name="mnist"), timeout=TIMEOUT)).config
        assert (config.name, config.max_batch_size) == ("mnist", 64)
        assert config.dynamic_batching.max_queue_delay_microseconds == 1500
        assert [(t.name, t.data_type, list(t.dims), t.optional) for t in config.input] == [
            ("pixels", pb.TYPE_UINT8, [784], True),
            ("features", pb.TYPE_FP32, [784], True),
        ]
        assert [(t.name, t.data_type, list(t.dims)) for t in config.output] == [
            ("digit", pb.TYPE_INT64, [1]),
            ("probabilities", pb.TYPE_FP32, [10]),
            ("logits", pb.TYPE_FP32, [10]),
            ("digit_score", pb.TYPE_FP32, [1]),
        ]
        check_rows(await stub.ModelInfer(raw(PIXELS[:5]), timeout=TIMEOUT), PIXELS[:5])
        counted = await stub.ModelStatistics(pb.ModelStatisticsRequest(name="mnist"), timeout=TIMEOUT)
        assert counted.model_stats[0].inference_count == 5


@pytest.mark.parametrize("method", list(METHODS))
async def test_bytes_that_are_no_message_are_refused_without_python_text(method: str) -> None:
    async with listening(Model()) as (_, channel):
        path = f"/{SERVICE_NAME}/{method}"
        if method == "ModelStreamInfer":
            stream: Any = channel.stream_stream(path)(timeout=TIMEOUT)
            await stream.write(b"\xff\xff\xff")
            error = await refusal(stream.read())
        else:
            unary: Any = channel.unary_unary(path)
            error = await refusal(unary(b"\xff\xff\xff", timeout=TIMEOUT))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        name = type(METHODS[method]).DESCRIPTOR.full_name
        assert error.details() == f"request: a request is a {name} message, these 3 bytes are none"


async def test_a_refusal_carries_its_code_and_field_over_the_wire() -> None:
    async with listening(Model()) as (_, channel):
        error = await refusal(stub_at(channel).ModelInfer(raw(PIXELS[:1, :783], (783,)), timeout=TIMEOUT))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
        detail = error_details_pb2.BadRequest()
        assert status is not None
        assert status.details[0].Unpack(detail)
        assert detail.field_violations[0].field == "inputs[0].shape"
        error = await refusal(stub_at(channel).ModelReady(pb.ModelReadyRequest(name="chess"), timeout=TIMEOUT))
        assert error.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelInfer", "ModelStreamInfer"])
async def test_a_bug_ends_in_internal_with_an_incident_and_no_python_text(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> Any:
        raise RuntimeError("secret tensor")

    monkeypatch.setattr(tensors, "metadata", broken)
    monkeypatch.setattr(tensors, "write_outputs", broken)
    async with listening(Model()) as (_, channel):
        if method == "ModelStreamInfer":
            call = stub_at(channel).ModelStreamInfer(timeout=TIMEOUT)
            await call.write(raw(PIXELS[:1]))
            message = (await call.read()).error_message
            assert message.startswith("INTERNAL: ")
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
        else:
            request = raw(PIXELS[:1]) if method == "ModelInfer" else METHODS[method]
            error = await refusal(getattr(stub_at(channel), method)(request, timeout=TIMEOUT))
            assert error.code() == grpc.StatusCode.INTERNAL
            message = error.details() or ""
    incident = message.split()[-1]
    assert "secret" not in message
    assert f"incident {incident}" in caplog.text
    assert "secret tensor" in caplog.text


async def test_a_stream_over_the_wire_is_answered_in_order_with_errors_in_their_place() -> None:
    async with listening(Model()) as (_, channel):
        call = stub_at(channel).ModelStreamInfer(timeout=TIMEOUT)
        for index in range(200):
            width = 783 if index % 10 == 9 else 784
            await call.write(raw(PIXELS[index : index + 1, :width], (width,), id=str(index)))
        await call.done_writing()
        answers = [answer async for answer in call]
        assert [answer.infer_response.id for answer in answers] == [str(index) for index in range(200)]
        for index, answer in enumerate(answers):
            if index % 10 == 9:
                assert "[1, 783]" in answer.error_message
            else:
                check_rows(answer.infer_response, PIXELS[index : index + 1])


async def test_a_drained_stream_ends_unavailable_over_the_wire() -> None:
    async with listening(Model()) as (served, channel):
        call = stub_at(channel).ModelStreamInfer(timeout=TIMEOUT)
        await call.write(raw(PIXELS[:1], id="a"))
        assert (await call.read()).infer_response.id == "a"
        served.service.drain()
        error = await refusal(call.read())
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "about to stop" in (error.details() or "")


async def test_a_stream_that_is_left_leaves_the_server_as_it_was() -> None:
    async with listening(Model()) as (served, channel):
        for _ in range(20):
            call = stub_at(channel).ModelStreamInfer(timeout=TIMEOUT)
            await call.write(raw(PIXELS[:20]))
            await call.read()
            call.cancel()
            assert await call.code() == grpc.StatusCode.CANCELLED
        check_rows(await stub_at(channel).ModelInfer(raw(PIXELS[:3]), timeout=TIMEOUT), PIXELS[:3])
        while served.calls.streams:  # the server learns of a cancellation a moment after us
            await stub_at(channel).ServerLive(pb.ServerLiveRequest(), timeout=TIMEOUT)


# The contract -----------------------------------------------------------------------


def test_names_and_numbers_are_those_of_the_protocol() -> None:
    """Real clients say the same, where they are: tests/server/test_open_inference_clients.py."""
    service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert service.full_name == "inference.GRPCInferenceService"
    assert {method.name: method.input_type.full_name for method in service.methods} == {
        method: type(request).DESCRIPTOR.full_name for method, request in METHODS.items()
    }
    expected = {
        "ModelInferRequest": "model_name model_version id parameters inputs outputs raw_input_contents",
        "ModelInferResponse": "model_name model_version id parameters outputs raw_output_contents",
        "ModelStreamInferResponse": "error_message infer_response",
        "ModelMetadataResponse": "name versions platform inputs outputs",
        "InferParameter": "bool_param int64_param string_param double_param uint64_param",
        "InferTensorContents": "bool_contents int_contents int64_contents uint_contents uint64_contents "
        "fp32_contents fp64_contents bytes_contents",
    }
    for name, fields in expected.items():
        numbered = [(field.name, field.number) for field in pb.DESCRIPTOR.message_types_by_name[name].fields]
        assert numbered == [(field, number) for number, field in enumerate(fields.split(), start=1)]
