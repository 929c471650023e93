"""The shortcut to a message makes the message that protobuf would have made."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from protos.mnist.v1 import digit_classifier_pb2 as pb
from server.answers import build_response
from server.batching import Answer
from server.inference import Scores


def scores_of(rows: int, version: str = "0123456789ab", classes: int = 10) -> Scores:
    chance = np.random.default_rng(rows)
    logits = chance.normal(size=(rows, classes)).astype(np.float32)
    odds = np.exp(logits)
    probabilities: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = odds / odds.sum(axis=1, keepdims=True)
    digit_scores: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = np.log(odds.sum(axis=1))
    return Scores(logits.argmax(axis=1).astype(np.uint8), probabilities, logits, digit_scores, version)


def built_the_ordinary_way(answers: list[Answer[Scores]], include_logits: bool) -> pb.ClassifyResponse:
    response = pb.ClassifyResponse()
    for answer in answers:
        response.digits.extend(answer.result.digits.tolist())
        response.probabilities.extend(answer.result.probabilities.ravel().tolist())
        response.digit_scores.extend(answer.result.digit_scores.tolist())
        if include_logits:
            response.logits.extend(answer.result.logits.ravel().tolist())
    response.receipt.model_version = "0123456789ab"
    response.receipt.batch_rows = max(answer.batch_rows for answer in answers)
    response.receipt.queue_time.FromMicroseconds(max(round(answer.queue_seconds * 1e6) for answer in answers))
    response.receipt.compute_time.FromMicroseconds(sum(round(answer.compute_seconds * 1e6) for answer in answers))
    return response


@pytest.mark.parametrize("include_logits", [False, True])
@pytest.mark.parametrize("parts", [[1], [10], [127], [128], [300], [1, 1], [256, 256, 5]], ids=str)
@pytest.mark.parametrize("classes", [10, 26, 100])
def test_a_response_equals_the_one_built_by_protobuf(parts: list[int], include_logits: bool, classes: int) -> None:
    answers = [Answer(scores_of(rows, classes=classes), rows + 3, 0.25 * rows, 0.5) for rows in parts]
    response = build_response(answers, include_logits)
    expected = built_the_ordinary_way(answers, include_logits)
    assert response == expected
    assert response.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)
    assert len(response.digits) == sum(parts)
    assert len(response.logits) == (classes * sum(parts) if include_logits else 0)


def test_rows_that_are_a_slice_of_a_larger_batch_are_sent_alone() -> None:
    whole = scores_of(10)
    response = build_response([Answer(whole[3:5], 10, 0, 0)], True)
    assert list(response.digits) == whole.digits[3:5].tolist()
    assert list(response.probabilities) == whole.probabilities[3:5].ravel().tolist()
    assert list(response.logits) == whole.logits[3:5].ravel().tolist()
    assert list(response.digit_scores) == whole.digit_scores[3:5].tolist()


def test_what_the_images_have_in_common_is_sent_once_and_only_where_there_is_something_to_say() -> None:
    plain = build_response([Answer(scores_of(2), 2, 0, 0)], False)
    assert not plain.HasField("digit_threshold")
    assert list(plain.labels) == []
    labels = tuple("abcdefghij")
    scores = replace(scores_of(5), digit_threshold=1.5, labels=labels)
    for parts in ([scores], [scores[:2], scores[2:]]):
        response = build_response([Answer(part, 5, 0, 0) for part in parts], False)
        assert response.digit_threshold == 1.5
        assert tuple(response.labels) == labels


def test_the_receipt_of_a_split_request_holds_the_longest_wait_and_the_whole_computation() -> None:
    answers = [Answer(scores_of(4), 4, 0.001, 0.5), Answer(scores_of(2), 9, 0.25, 0.25)]
    receipt = build_response(answers, False).receipt
    assert receipt.batch_rows == 9
    assert receipt.queue_time.ToMilliseconds() == 250
    assert receipt.compute_time.ToMilliseconds() == 750
