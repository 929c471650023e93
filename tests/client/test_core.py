"""The half of the clients that does no I/O: messages, order, errors, options."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import FrozenInstanceError, fields
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

import client
from client import _channel, _core
from protos.mnist.v1 import digit_classifier_pb2 as pb

Pixels = npt.NDArray[np.uint8]


def pixels(value: int) -> Pixels:
    """A frame that can be told from others."""
    return np.full(784, value, np.uint8)


def answer(*digits: int, classes: int = 10) -> pb.ClassifyResponse:
    """One row a digit, with a probability of 0.91."""
    rest = 0.09 / (classes - 1)
    probabilities = [0.91 if column == digit else rest for digit in digits for column in range(classes)]
    return pb.ClassifyResponse(digits=digits, probabilities=probabilities)


def parse(response: pb.ClassifyResponse) -> list[client.Prediction]:
    return _core.parse_response(response, len(response.digits), "there")


# Images and requests --------------------------------------------------------


def test_an_image_becomes_784_bytes(digits: list[Pixels]) -> None:
    prepared = _core.prepare(digits[7])
    assert prepared.shape == (784,)
    assert prepared.dtype == np.uint8
    assert _core.build_request(prepared).pixels == digits[7].tobytes()


def test_a_bad_image_of_several_says_which_it_is(blank: Pixels) -> None:
    with pytest.raises(client.InvalidImageError, match=r"^image 5: .*contrast") as caught:
        _core.prepare(blank, 5)
    assert caught.value.index == 5
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_single_bad_image_has_no_index(blank: Pixels) -> None:
    with pytest.raises(client.InvalidImageError, match=r"^an image of a digit has a contrast") as caught:
        _core.prepare(blank)
    assert caught.value.index is None


# Responses ------------------------------------------------------------------


def test_a_response_becomes_predictions_in_its_order() -> None:
    response = answer(3, 1)
    response.receipt.CopyFrom(
        pb.Receipt(
            model_version="0123456789ab",
            batch_rows=64,
            queue_time=Duration(nanos=1_500_000),
            compute_time=Duration(seconds=2),
        )
    )
    three, one = parse(response)
    assert (three.digit, one.digit) == (3, 1)
    assert three.confidence == pytest.approx(0.91)
    assert three.probabilities.dtype == np.float32
    np.testing.assert_allclose(one.probabilities, [0.01, 0.91] + [0.01] * 8, rtol=1e-6)
    assert (three.model_version, three.batch_rows) == ("0123456789ab", 64)
    assert (three.queue_seconds, three.compute_seconds) == (0.0015, 2.0)


def test_a_prediction_says_whether_the_image_looks_like_a_digit() -> None:
    response = answer(3, 4, 5)
    response.digit_scores.extend([4.5, -1.0, 2.0])
    response.digit_threshold = 2.0
    predictions = parse(response)
    assert [prediction.digit_score for prediction in predictions] == [4.5, -1.0, 2.0]
    assert [prediction.is_digit for prediction in predictions] == [True, False, True]
    assert predictions[1].digit == 4  # the best guess


def test_a_model_without_a_threshold_has_scores_and_no_verdict() -> None:
    response = answer(3)
    response.digit_scores.append(4.5)
    [prediction] = parse(response)
    assert (prediction.digit_score, prediction.is_digit) == (4.5, None)


def test_an_older_server_says_neither_score_nor_labels() -> None:
    predictions = parse(answer(3, 7))
    for prediction in predictions:
        assert math.isnan(prediction.digit_score)
        assert prediction.is_digit is None
    assert [prediction.label for prediction in predictions] == ["3", "7"]


def test_an_older_client_reads_what_it_knows_of_a_newer_answer() -> None:
    """The new fields are of new numbers, and the old ones stand as before."""
    old, new = answer(3, 7), answer(3, 7)
    new.digit_scores.extend([1.0, 2.0])
    new.digit_threshold = 0.5
    new.labels.extend("abcdefghij")
    for name in ("digit_scores", "digit_threshold", "labels"):
        new.ClearField(name)
    assert new == old
    numbers = {field.name: field.number for field in pb.ClassifyResponse.DESCRIPTOR.fields}
    assert numbers == {
        "digits": 1,
        "probabilities": 2,
        "logits": 3,
        "receipt": 4,
        "digit_scores": 5,
        "digit_threshold": 6,
        "labels": 7,
    }


def test_a_prediction_has_the_models_name_for_its_class() -> None:
    response = answer(1, 9)
    response.labels.extend(["T-shirt", "Trouser", "2", "3", "4", "5", "6", "7", "8", "Ankle boot"])
    predictions = parse(response)
    assert [prediction.label for prediction in predictions] == ["Trouser", "Ankle boot"]
    assert predictions[0].labels[0] == "T-shirt"


def test_digit_scores_for_other_images_are_no_answer() -> None:
    response = answer(3, 7)
    response.digit_scores.extend([1.0, 2.0, 3.0])
    with pytest.raises(client.ServerError, match=r"answered 2 images with 3 digit scores"):
        parse(response)


@pytest.mark.parametrize("classes", [2, 9, 11, 26])
def test_probabilities_of_other_classes_than_the_labels_are_no_answer(classes: int) -> None:
    response = answer(3, 7)
    response.labels.extend(["a"] * classes)
    told = rf"^there: the server answered 2 images with 2 digits and 20 probabilities of {classes} classes$"
    with pytest.raises(client.ServerError, match=told):
        parse(response)


def test_without_labels_an_answer_of_other_classes_than_ten_is_none() -> None:
    response = answer(3, classes=26)
    with pytest.raises(client.ServerError, match=r"1 digits and 26 probabilities of 10 classes"):
        parse(response)


@pytest.mark.parametrize("classes", [11, 26, 100])
def test_there_are_as_many_classes_as_labels(classes: int) -> None:
    response = answer(classes - 1, 0, 10, classes=classes)
    response.labels.extend(labels := [f"class {number}" for number in range(classes)])
    response.digit_scores.extend([1.0, 2.0, 3.0])
    predictions = parse(response)
    assert [prediction.digit for prediction in predictions] == [classes - 1, 0, 10]
    assert [prediction.label for prediction in predictions] == [labels[classes - 1], "class 0", "class 10"]
    for prediction in predictions:
        assert (prediction.probabilities.shape, str(prediction.probabilities.dtype)) == ((classes,), "float32")
        assert float(prediction.probabilities[prediction.digit]) == prediction.confidence == np.float32(0.91)
        assert prediction.labels == tuple(labels)
    assert repr(predictions[0]) == f"Prediction(digit={classes - 1}, label='class {classes - 1}', confidence=0.9100)"


def test_a_class_that_is_none_is_no_answer() -> None:
    response = answer(3, classes=26)
    response.labels.extend("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    response.digits[0] = 26
    with pytest.raises(client.ServerError, match=r"of 26 classes"):
        parse(response)


def test_a_prediction_that_was_parsed_is_like_one_that_was_made() -> None:
    [parsed] = parse(answer(3))
    row = parsed.probabilities
    made = client.Prediction(3, parsed.confidence, row, "", 0, 0.0, 0.0)
    assert type(parsed) is client.Prediction
    for field in fields(client.Prediction):
        assert repr(getattr(parsed, field.name)) == repr(getattr(made, field.name))
    with pytest.raises(FrozenInstanceError):
        parsed.digit = 4  # type: ignore[misc]
    assert repr(pickle.loads(pickle.dumps(parsed))) == repr(parsed)


def test_probabilities_cannot_be_written() -> None:
    [prediction] = parse(answer(3))
    with pytest.raises(ValueError, match="read-only"):
        prediction.probabilities[0] = 1


def test_a_prediction_prints_as_a_person_reads_it() -> None:
    assert repr(parse(answer(3))[0]) == "Prediction(digit=3, confidence=0.9100)"


def test_a_prediction_prints_a_label_that_is_no_digit() -> None:
    named = answer(3)
    named.labels.extend(["T-shirt", "Trouser", "Pullover", "Dress", *[""] * 6])
    assert repr(parse(named)[0]) == "Prediction(digit=3, label='Dress', confidence=0.9100)"
    nameless = answer(7)
    nameless.labels.extend(named.labels)
    assert repr(parse(nameless)[0]) == "Prediction(digit=7, confidence=0.9100)"


@pytest.mark.parametrize("threshold", [None, 0.0, -2.5])
def test_a_model_has_a_digit_threshold_or_none(threshold: float | None) -> None:
    assert _core.parse_model(pb.GetModelResponse(digit_threshold=threshold)).digit_threshold == threshold


@pytest.mark.parametrize("accuracy", [None, 0.98])
def test_a_model_has_an_accuracy_or_none(accuracy: float | None) -> None:
    model = _core.parse_model(pb.GetModelResponse(name="mnist", labels="0123456789", test_accuracy=accuracy))
    assert model.test_accuracy == (None if accuracy is None else pytest.approx(accuracy))
    assert model.labels == tuple("0123456789")


# Errors ---------------------------------------------------------------------


class FakeRpcError(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str | None, **metadata: str) -> None:
        super().__init__()
        self._code, self._details, self._metadata = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details

    def trailing_metadata(self) -> Any:
        return tuple((name.replace("_", "-"), value) for name, value in self._metadata.items()) or None


KINDS = {
    "INVALID_ARGUMENT": client.InvalidImageError,
    "DEADLINE_EXCEEDED": client.DeadlineExceededError,
    "RESOURCE_EXHAUSTED": client.OverloadedError,
    "UNAVAILABLE": client.UnavailableError,
    "UNAUTHENTICATED": client.UnauthenticatedError,
    "PERMISSION_DENIED": client.UnauthenticatedError,
}


@pytest.mark.parametrize("code", list(grpc.StatusCode), ids=lambda code: code.name)
def test_every_status_code_has_its_class(code: grpc.StatusCode) -> None:
    cause = FakeRpcError(code, "why", incident_id="abc")
    with pytest.raises(client.MnistGrpcError) as caught, _core.translate_errors("there:1", 2.5):
        raise cause
    assert type(caught.value) is KINDS.get(code.name, client.ServerError)
    assert caught.value.code == code.name
    assert caught.value.incident_id == "abc"
    assert caught.value.__cause__ is cause
    assert str(caught.value).startswith("there:1: ")


def test_an_error_without_details_or_metadata_is_still_an_error() -> None:
    error = _core.error_of_call(FakeRpcError(grpc.StatusCode.UNKNOWN, None), "there:1", 1)
    assert str(error) == "there:1: no details; the server's log tells more"
    assert error.incident_id is None


def test_a_deadline_error_says_how_long_it_was() -> None:
    error = _core.error_of_call(FakeRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"), "there:1", 2.5)
    assert str(error).startswith("there:1: no answer within 2.5 s; ")


def test_a_refused_connection_asks_whether_the_server_runs() -> None:
    details = "failed to connect to all addresses"
    error = _core.error_of_call(FakeRpcError(grpc.StatusCode.UNAVAILABLE, details), "there:1", 1)
    assert str(error).startswith("there:1: no server answers there; is it running, ")
    assert str(error).endswith(f" ({details})")


def test_a_server_that_will_not_serve_speaks_for_itself() -> None:
    error = _core.error_of_call(FakeRpcError(grpc.StatusCode.UNAVAILABLE, "the model is not loaded yet"), "there:1", 1)
    assert str(error).startswith("there:1: the model is not loaded yet; ")


@pytest.mark.parametrize(
    "details",
    [
        "Received message larger than max (802830 vs. 500)",
        "SERVER: Received message larger than max (802830 vs. 500)",
        "CLIENT: Sent message larger than max (802830 vs. 500)",
    ],
)
def test_a_message_too_long_for_grpc_is_no_overload(details: str) -> None:
    error = _core.error_of_call(FakeRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, details), "there:1", 1)
    assert type(error) is client.InvalidImageError
    assert error.code == "RESOURCE_EXHAUSTED"


def test_other_exceptions_pass_untouched() -> None:
    with pytest.raises(KeyError), _core.translate_errors("there:1", 1):
        raise KeyError("mine")


# Target, options, health ----------------------------------------------------


def test_the_target_given_beats_the_environment_beats_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _channel.resolve_target(None) == "localhost:50051"
    assert client.Client("given:1").target == "given:1"
    monkeypatch.setenv("MNIST_GRPC_TARGET", "environment:2")
    assert _channel.resolve_target(None) == "environment:2"
    assert _channel.resolve_target("given:1") == "given:1"
    monkeypatch.setenv("MNIST_GRPC_TARGET", "")
    assert _channel.resolve_target(None) == "localhost:50051"


def test_the_service_config_is_json_that_names_real_methods() -> None:
    config = json.loads(str(dict(_channel.channel_options("there:1"))["grpc.service_config"]))
    methods = pb.DESCRIPTOR.services_by_name["DigitClassifier"].methods_by_name
    [method_config] = config["methodConfig"]
    assert [name["service"] for name in method_config["name"]] == ["mnist.v1.DigitClassifier"] * 2
    assert {name["method"] for name in method_config["name"]} == set(methods) - {"StreamClassify"}
    assert {*method_config["retryPolicy"]["retryableStatusCodes"]} <= {code.name for code in grpc.StatusCode}
    assert method_config["retryPolicy"]["maxAttempts"] <= 5  # gRPC cuts more
    assert config["loadBalancingConfig"] == [{"round_robin": {}}]


@pytest.mark.parametrize("target", ["localhost:50051", "127.0.0.1:50051", "[::1]:50051", "unix:/run/digits.sock"])
def test_no_proxy_stands_before_this_machine(target: str) -> None:
    assert dict(_channel.channel_options(target))["grpc.enable_http_proxy"] == 0


@pytest.mark.parametrize("target", ["digits:50051", "dns:///digits:50051", "localhost.example.com:50051"])
def test_a_proxy_may_stand_before_another_machine(target: str) -> None:
    assert "grpc.enable_http_proxy" not in dict(_channel.channel_options(target))


def test_health_messages_are_what_protobuf_would_write() -> None:
    # On the wire, StringValue and Int32Value are the health messages: one field, number 1, of the same kind.
    assert _core.health_request() == StringValue(value="mnist.v1.DigitClassifier").SerializeToString()
    answers = [Int32Value(value=status).SerializeToString() for status in range(4)]
    assert [_core.is_serving(answer) for answer in answers] == [False, True, False, False]


CANONICAL = np.zeros((28, 28), np.uint8)
CANONICAL[4:24, 13:16] = 255


@pytest.mark.parametrize(
    ("image", "quick"),
    [
        (CANONICAL, True),
        (pickle.loads(pickle.dumps(CANONICAL)), True),  # whose type is equal to uint8, and another object
        (255 - CANONICAL, False),
        (CANONICAL.astype(np.float64), False),
        (np.zeros((56, 56), np.uint8), False),
        ("digit.png", False),
    ],
)
def test_only_canonical_arrays_are_prepared_on_the_event_loop(image: Any, quick: bool) -> None:
    assert _core.is_quick(image) is quick
