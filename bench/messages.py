"""`python -m bench.messages`: what it takes to make an answer's message, and to read it.

Compares protobuf's own way, columns as Python lists, with the arrays' memory
that `server.answers.build_response` lays into the wire form.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from functools import partial

import numpy as np

from digits.preprocessing import CLASSES
from protos.mnist.v1 import digit_classifier_pb2 as pb
from server.answers import build_response
from server.batching import Answer
from server.inference import Scores

REPEATS = 7
SECONDS = 0.1


def best_us(function: Callable[[], object]) -> float:
    """Microseconds a call, the best of some repeats."""
    timer = timeit.Timer(function)
    calls, _ = timer.autorange()
    calls = max(1, int(calls * SECONDS / 0.2))
    return min(timer.repeat(REPEATS, calls)) / calls * 1e6


def answer_of(count: int) -> Answer[Scores]:
    random = np.random.default_rng(0)
    logits = random.normal(size=(count, CLASSES)).astype(np.float32)
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    digit_scores = np.log(np.exp(logits).sum(axis=1))
    scores = Scores(logits.argmax(axis=1).astype(np.uint8), probabilities, logits, digit_scores, "0123456789ab")
    return Answer(scores, count, queue_seconds=1e-4, compute_seconds=1e-4)


def build_with_lists(answer: Answer[Scores]) -> pb.ClassifyResponse:
    """The plain way to make what `build_response` makes."""
    scores = answer.result
    response = pb.ClassifyResponse(
        digits=scores.digits.tolist(),
        probabilities=scores.probabilities.ravel().tolist(),
        digit_scores=scores.digit_scores.tolist(),
    )
    receipt = response.receipt
    receipt.model_version = scores.model_version
    receipt.batch_rows = answer.batch_rows
    receipt.queue_time.FromNanoseconds(int(answer.queue_seconds * 1e9))
    receipt.compute_time.FromNanoseconds(int(answer.compute_seconds * 1e9))
    return response


def read(wire: bytes) -> tuple[object, object]:
    """As a client does: digits `[n]` and probabilities `[n, 10]` as arrays."""
    response = pb.ClassifyResponse.FromString(wire)
    return np.array(response.digits, np.uint8), np.array(response.probabilities, np.float32).reshape(-1, CLASSES)


def main() -> None:
    print(f"{'microseconds':34} {'n = 1':>8} {'n = 256':>8}")
    answers = [answer_of(count) for count in (1, 256)]
    for answer in answers:
        if build_with_lists(answer) != build_response([answer], include_logits=False):
            raise SystemExit("bench.messages: the two ways do not make the same message")
    wires = {len(answer.result): build_with_lists(answer).SerializeToString() for answer in answers}
    rows: dict[str, Callable[[Answer[Scores]], object]] = {
        "make, columns as Python lists": build_with_lists,
        "make, build_response": lambda answer: build_response([answer], include_logits=False),
        "make and serialize, lists": lambda answer: build_with_lists(answer).SerializeToString(),
        "make and serialize, build_response": lambda answer: build_response(
            [answer], include_logits=False
        ).SerializeToString(),
        "parse and np.array(field)": lambda answer: read(wires[len(answer.result)]),
    }
    for name, step in rows.items():
        times = [best_us(partial(step, answer)) for answer in answers]
        print(f"{name:34} " + " ".join(f"{time:>8.1f}" for time in times))


if __name__ == "__main__":
    main()
