"""The service without a transport: messages in, messages or a ServiceError out."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import server.service
from digits.checkpoint import Checkpoint, Manifest
from digits.network import ImprovedNN
from protos.mnist.v1 import digit_classifier_pb2 as pb
from server.errors import DeadlineExceeded, Internal, InvalidArgument, NotServing, Overloaded, ServiceError
from server.inference import Classifier, Scores
from server.inputs import Rows, decode
from server.observer import Observer
from server.service import RECENT_CALLS, DigitService
from server.settings import Settings

pytestmark = pytest.mark.usefixtures("no_stray_errors")

PIXELS = np.random.default_rng(0).integers(0, 256, (300, 784), np.uint8)


class Model(Classifier):
    """An untrained network that remembers the rows of its batches and waits to be let go when held."""

    def __init__(
        self,
        *,
        held: bool = False,
        version: str = "0123456789ab",
        seed: int = 0,
        manifest: Manifest = Manifest(),  # noqa: B008  # it is frozen
    ) -> None:
        torch.manual_seed(seed)
        super().__init__(Checkpoint(ImprovedNN(), manifest, version + 52 * "0"))
        self.batches: list[int] = []
        self.held = held
        self._begun = threading.Semaphore(0)
        self._go = threading.Semaphore(0)

    def run_batch(self, blocks: Sequence[Rows]) -> list[Scores]:
        self.batches.append(sum(len(block) for block in blocks))
        self._begun.release()
        if self.held:
            assert self._go.acquire(timeout=20), "nobody let the model go"
        return super().run_batch(blocks)

    async def begun(self) -> None:
        """Wait until one more batch has begun."""
        assert await asyncio.to_thread(self._begun.acquire, timeout=20)

    def let_go(self, batches: int = 1) -> None:
        self._go.release(batches)


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def held_model(monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model whose batches all run in the thread, each until it is let go."""
    monkeypatch.setattr(server.service, "INLINE_SIZE", 0)
    return Model(held=True)


class DroppedFrames(Observer):
    """Counts the frames that were overtaken."""

    frames = 0

    def frames_dropped(self, frames: int) -> None:
        self.frames += frames


@asynccontextmanager
async def serving(
    model: Model | None, observer: Observer | None = None, **settings: Any
) -> AsyncIterator[DigitService]:
    async with DigitService(Settings(**settings), observer) as service:
        if model is not None:
            service.serve_model(model)
        yield service


def request_of(rows: slice | int, *, include_logits: bool = False) -> pb.ClassifyRequest:
    return pb.ClassifyRequest(pixels=PIXELS[rows].tobytes(), include_logits=include_logits)


def files(*contents: bytes) -> pb.ClassifyRequest:
    return pb.ClassifyRequest(encoded=pb.EncodedImages(files=contents))


def check_rows(response: pb.ClassifyResponse, rows: npt.NDArray[np.uint8]) -> None:
    """The response answers these pixels, in order."""
    expected = Model().predict(rows)
    assert list(response.digits) == expected.digits.tolist()
    given = np.array(response.probabilities, np.float32).reshape(-1, 10)
    np.testing.assert_allclose(given, expected.probabilities, atol=1e-5)


class Conversation:
    """The far end of a stream: what it sends, and what it has got."""

    def __init__(self, service: DigitService) -> None:
        self._requests: asyncio.Queue[pb.StreamClassifyRequest | None] = asyncio.Queue()
        self.blocks: list[pb.FrameBlock] = []
        self.messages: list[int] = []
        self.reads = 0
        self._service = service
        self._waiting = asyncio.Event()
        self._got = asyncio.Event()
        self._sent = 0

    def send(self, frames: pb.ClassifyRequest, first: int | None = None, *, latest_only: bool = False) -> None:
        self._requests.put_nowait(
            pb.StreamClassifyRequest(
                first_sequence=self._sent if first is None else first, frames=frames, latest_only=latest_only
            )
        )
        self._sent += max(1, len(frames.pixels) // 784, len(frames.encoded.files))
        self._waiting.clear()

    def end(self) -> None:
        self._requests.put_nowait(None)

    def start(self, timeout: float | None = None) -> asyncio.Task[None]:
        return asyncio.create_task(self._service.stream_classify(self._read, self._write, timeout))

    async def all_read(self) -> None:
        """Wait until the service has read all that was sent and asks for more."""
        await asyncio.wait_for(self._waiting.wait(), 20)

    async def answered(self, frames: int) -> None:
        """Wait until this many frames are answered."""
        async with asyncio.timeout(20):
            while sum(block.frame_count for block in self.blocks) < frames:
                self._got.clear()
                await self._got.wait()

    async def _read(self) -> pb.StreamClassifyRequest | None:
        if self._requests.empty():
            self._waiting.set()
        request = await self._requests.get()
        self.reads += request is not None
        return request

    async def _write(self, response: pb.StreamClassifyResponse) -> None:
        self.messages.append(len(response.blocks))
        self.blocks.extend(response.blocks)
        self._got.set()


async def idle() -> None:
    """Let everything run that can run without a thread's answer."""
    for _ in range(50):
        await asyncio.sleep(0)


# Classify -----------------------------------------------------------------------


async def test_pixels_are_answered_in_order_with_a_receipt(model: Model) -> None:
    async with serving(model) as service:
        response = await service.classify(request_of(slice(0, 5)))
    check_rows(response, PIXELS[:5])
    assert len(response.logits) == 0
    assert response.receipt.model_version == "0123456789ab"
    assert response.receipt.batch_rows == 5


async def test_logits_come_when_asked_for(model: Model) -> None:
    async with serving(model) as service:
        response = await service.classify(request_of(slice(0, 2), include_logits=True))
    logits = np.array(response.logits, np.float32).reshape(2, 10)
    np.testing.assert_allclose(logits, Model().predict(PIXELS[:2]).logits, rtol=1e-4, atol=1e-4)


async def test_encoded_files_are_answered_as_their_pixels(
    model: Model, golden: tuple[npt.NDArray[np.uint8], list[int]], golden_files: list[bytes]
) -> None:
    async with serving(model) as service:
        check_rows(await service.classify(files(*golden_files)), golden[0])


async def test_a_request_larger_than_a_batch_is_split_and_put_together_again(model: Model) -> None:
    async with serving(model, max_batch_size=8) as service:
        response = await service.classify(request_of(slice(0, 21)))
    assert model.batches == [8, 8, 5]
    assert response.receipt.batch_rows == 8
    check_rows(response, PIXELS[:21])


async def test_requests_that_wait_together_are_computed_together(held_model: Model) -> None:
    async with serving(held_model) as service:
        calls = [asyncio.create_task(service.classify(request_of(slice(0, 1))))]
        await held_model.begun()
        calls += [asyncio.create_task(service.classify(request_of(slice(n, n + 2)))) for n in range(10)]
        await idle()
        held_model.let_go(2)
        responses = await asyncio.gather(*calls)
    assert held_model.batches == [1, 20]
    for n, response in enumerate(responses[1:]):
        check_rows(response, PIXELS[n : n + 2])


async def test_the_images_of_one_answer_are_all_of_the_model_that_its_receipt_names() -> None:
    after = Model(version="ffffffffffff", seed=1)

    class Before(Model):
        def run_batch(self, blocks: Sequence[Rows]) -> list[Scores]:
            service.serve_model(after)
            return super().run_batch(blocks)

    before = Before()
    async with serving(before, max_batch_size=4) as service:
        response = await service.classify(request_of(slice(0, 8)))
    named = after if response.receipt.model_version == "ffffffffffff" else before
    given = np.array(response.probabilities, np.float32).reshape(8, 10)
    np.testing.assert_allclose(given, named.predict(PIXELS[:8]).probabilities, atol=1e-5)


BAD = [
    (pb.ClassifyRequest(), "images", "exactly one of pixels, features and encoded is set, here none is"),
    (pb.ClassifyRequest(pixels=b""), "pixels", "a request carries 1 or more images, this one carries 0"),
    (pb.ClassifyRequest(pixels=bytes(783)), "pixels", "784 bytes an image, but 783 bytes are no whole number"),
    (pb.ClassifyRequest(features=bytes(784)), "features", "3136 bytes an image, but 784 bytes are no whole number"),
    (
        pb.ClassifyRequest(features=np.full(784, np.nan, "<f4").tobytes()),
        "features",
        "every value is finite and from -1000000 to 1000000, but image 0 holds nan at position 0",
    ),
    (files(), "encoded.files", "a request carries 1 or more images, this one carries 0"),
    (files(b""), "encoded.files[0]", "the file is empty (0 bytes)"),
    (files(b"hello"), "encoded.files[0]", "the file is no "),
    (request_of(slice(0, 65)), "images", "a request carries at most 64 images, this one 65"),
    (pb.ClassifyRequest(pixels=bytes(784 * 100)), "images", "a request has at most 65536 bytes, this one has 784"),
]


@pytest.mark.parametrize(("request_", "field", "message"), BAD, ids=[f"{field}: {text}" for _, field, text in BAD])
async def test_a_request_that_breaks_a_rule_is_refused_with_field_rule_and_value(
    request_: pb.ClassifyRequest, field: str, message: str, model: Model
) -> None:
    async with serving(model, max_queue_size=64, max_message_bytes=65536) as service:
        with pytest.raises(InvalidArgument, match=re.escape(message)) as error:
            await service.classify(request_)
        assert str(error.value).startswith(f"{field}: ")
        assert error.value.field == field
    assert model.batches == []


async def test_the_first_bad_image_of_a_request_is_the_one_that_is_told(
    model: Model, golden_files: list[bytes]
) -> None:
    async with serving(model) as service:
        with pytest.raises(InvalidArgument, match=r"^encoded.files\[1\]: "):
            await service.classify(files(golden_files[0], b"bad", golden_files[1], b""))
    assert model.batches == []


@pytest.mark.parametrize("value", [3e38, -3e38, 1e30])
async def test_what_is_accepted_gets_probabilities_that_sum_to_one(value: float, model: Model) -> None:
    features = np.full((2, 784), value, "<f4")
    features[:, ::2] *= -1
    async with serving(model) as service:
        try:
            response = await service.classify(pb.ClassifyRequest(features=features.tobytes()))
        except InvalidArgument:
            return  # to refuse it is as good
    rows = np.array(response.probabilities).reshape(2, 10)
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-5)


async def test_before_a_model_is_served_every_method_is_unavailable() -> None:
    async with serving(None) as service:
        with pytest.raises(NotServing, match="not loaded yet"):
            await service.classify(request_of(slice(0, 1)))
        with pytest.raises(NotServing, match="not loaded yet"):
            service.get_model()
        far_end = Conversation(service)
        far_end.send(request_of(slice(0, 1)))
        far_end.end()
        with pytest.raises(NotServing, match="not loaded yet"):
            await far_end.start()


async def test_get_model_describes_what_is_served(model: Model) -> None:
    async with serving(model, max_batch_size=7, max_message_bytes=2048) as service:
        described = service.get_model()
    assert described.name == "mnist"
    assert described.version == described.weights_sha256[:12] == "0123456789ab"
    assert described.architecture == "ImprovedNN"
    assert described.parameter_count == 235_146
    assert list(described.labels) == list("0123456789")
    assert (described.normalization_mean, described.normalization_std, described.temperature) == (0.5, 0.5, 1)
    assert not described.HasField("test_accuracy")
    assert (described.max_batch_size, described.max_message_bytes) == (7, 2048)
    assert described.server_version


async def test_a_model_that_is_not_quick_leaves_the_loop_free() -> None:
    threads = []

    class Watched(Model):
        def run_batch(self, blocks: Sequence[Rows]) -> list[Scores]:
            threads.append(threading.current_thread())
            return super().run_batch(blocks)

    class Slow(Watched):
        is_quick = False

    async with serving(Watched()) as service:
        await service.classify(request_of(slice(0, 1)))
        service.serve_model(Slow())
        await service.classify(request_of(slice(0, 1)))
        service.serve_model(Watched())
        await service.classify(request_of(slice(0, 1)))
    here = threading.main_thread()
    assert [thread is here for thread in threads] == [True, False, True]


async def test_answers_and_the_description_say_what_the_manifest_says_of_digits() -> None:
    labels = tuple("abcdefghij")
    manifest = Manifest(digit_threshold=-1.5, labels=labels)
    async with serving(Model(manifest=manifest)) as service:
        described = service.get_model()
        response = await service.classify(request_of(slice(0, 3)))
    assert described.digit_threshold == response.digit_threshold == -1.5
    assert tuple(response.labels) == tuple(described.labels) == labels
    assert len(response.digit_scores) == 3


async def test_a_model_of_digits_without_a_threshold_sends_scores_alone(model: Model) -> None:
    async with serving(model) as service:
        described = service.get_model()
        response = await service.classify(request_of(slice(0, 300)))
    assert not described.HasField("digit_threshold")
    assert not response.HasField("digit_threshold")
    assert list(response.labels) == []
    assert len(response.digit_scores) == 300


async def test_a_full_queue_is_told_with_numbers_and_a_time_to_wait(held_model: Model) -> None:
    async with serving(held_model, max_queue_size=4) as service:
        calls = [asyncio.create_task(service.classify(request_of(slice(0, 1))))]
        await held_model.begun()
        calls.append(asyncio.create_task(service.classify(request_of(slice(0, 3)))))
        await idle()
        with pytest.raises(Overloaded, match="holds 3 of at most 4 rows: no room for 2 more") as error:
            await service.classify(request_of(slice(0, 2)))
        assert error.value.retry_after_seconds is not None
        assert 0 < error.value.retry_after_seconds <= 1
        held_model.let_go(2)
        await asyncio.gather(*calls)


async def test_a_deadline_that_passes_in_the_queue_is_told_and_not_computed(held_model: Model) -> None:
    async with serving(held_model) as service:
        running = asyncio.create_task(service.classify(request_of(slice(0, 1))))
        await held_model.begun()
        late = asyncio.create_task(service.classify(request_of(slice(0, 2)), timeout=0))
        await idle()
        held_model.let_go()
        await running
        with pytest.raises(DeadlineExceeded, match="waited in the queue"):
            await late
    assert held_model.batches == [1]


async def test_the_time_of_decoding_counts_towards_the_deadline(
    model: Model, golden_files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = threading.Event()

    def slow_decode(file: bytes) -> Any:
        assert decoded.wait(20)
        return decode(file)

    monkeypatch.setattr(server.service, "decode", slow_decode)
    async with serving(model) as service:
        asyncio.get_running_loop().call_later(0.06, decoded.set)
        with pytest.raises(DeadlineExceeded):
            await service.classify(files(golden_files[0]), timeout=0.05)
    assert model.batches == []


async def test_requests_take_turns_at_the_decoder_file_by_file(
    model: Model, golden_files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []
    first, go = threading.Event(), threading.Event()

    def noted(file: bytes) -> Any:
        decoded.append(file)
        first.set()
        assert go.wait(20)
        return decode(file)

    monkeypatch.setattr(server.service, "decode", noted)
    async with serving(model) as service:
        many = asyncio.create_task(service.classify(files(*golden_files[:10])))
        assert await asyncio.to_thread(first.wait, 20)
        one = asyncio.create_task(service.classify(files(golden_files[19])))
        await idle()
        go.set()
        await asyncio.gather(many, one)
    assert decoded.index(golden_files[19]) <= 2


async def test_files_that_wait_for_the_decoder_are_bounded_in_bytes(
    model: Model, golden_files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def slow_decode(file: bytes) -> Any:
        assert go.wait(20)
        return decode(file)

    monkeypatch.setattr(server.service, "decode", slow_decode)
    monkeypatch.setattr(server.service, "MAX_DECODING_BYTES", len(golden_files[0]) + 10)
    async with serving(model) as service:
        first = asyncio.create_task(service.classify(files(golden_files[0])))
        await idle()
        with pytest.raises(Overloaded, match="wait to be decoded"):
            await service.classify(files(golden_files[1]))
        go.set()
        await first
        await service.classify(files(golden_files[1]))  # there is room again


async def test_a_fault_in_describing_the_model_is_an_incident(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(model) as service:
        monkeypatch.setattr(service, "_describe", lambda _: 1 / 0)
        with pytest.raises(Internal) as error:
            service.get_model()
    assert "division" not in str(error.value)
    assert "ZeroDivisionError" in caplog.text


async def test_a_cancelled_call_leaves_the_queue(held_model: Model) -> None:
    async with serving(held_model, max_queue_size=4) as service:
        running = asyncio.create_task(service.classify(request_of(slice(0, 1))))
        await held_model.begun()
        gone = asyncio.create_task(service.classify(request_of(slice(0, 4))))
        await idle()
        gone.cancel()
        await idle()
        kept = asyncio.create_task(service.classify(request_of(slice(4, 8))))
        await idle()
        held_model.let_go(2)
        await running
        check_rows(await kept, PIXELS[4:8])
        assert gone.cancelled()
    assert held_model.batches == [1, 4]


async def test_one_bad_call_does_not_fail_its_neighbours(model: Model) -> None:
    async with serving(model) as service:
        calls = [service.classify(request_of(n) if n % 3 else files(b"bad")) for n in range(30)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    for n, outcome in enumerate(outcomes):
        if n % 3:
            assert isinstance(outcome, pb.ClassifyResponse)
            check_rows(outcome, PIXELS[n : n + 1])
        else:
            assert isinstance(outcome, InvalidArgument)


async def test_a_bug_is_told_by_an_incident_and_logged_with_its_traceback(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(blocks: Sequence[Rows]) -> list[Scores]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    async with serving(model) as service:
        monkeypatch.setattr(model, "run_batch", broken)
        with pytest.raises(Internal) as error:
            await service.classify(request_of(slice(0, 300)))
        monkeypatch.undo()
        check_rows(await service.classify(request_of(slice(0, 1))), PIXELS[:1])
    assert error.value.incident_id in str(error.value)
    assert "mat1" not in str(error.value)
    assert "RuntimeError" not in str(error.value)
    incident = next(record for record in caplog.records if error.value.incident_id in record.getMessage())
    assert incident.exc_info is not None
    assert "mat1 and mat2" in str(incident.exc_info[1])


async def test_the_callers_of_a_failed_batch_share_one_incident_and_one_traceback(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(blocks: Sequence[Rows]) -> list[Scores]:
        raise RuntimeError("broken engine")

    monkeypatch.setattr(server.service, "INLINE_SIZE", 0)  # so that nobody is computed alone
    async with serving(model) as service:
        monkeypatch.setattr(model, "run_batch", broken)
        calls = (service.classify(request_of(slice(row, row + 1))) for row in range(5))
        errors = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(error, Internal) for error in errors)
    incidents = {error.incident_id for error in errors if isinstance(error, Internal)}
    assert len(incidents) == len([record for record in caplog.records if record.exc_info]) == 1


# StreamClassify --------------------------------------------------------------------


async def test_frames_are_answered_under_their_own_numbers(model: Model) -> None:
    async with serving(model) as service:
        far_end = Conversation(service)
        for first, rows in ((7, slice(0, 2)), (100, slice(2, 3)), (5, slice(3, 6))):
            far_end.send(request_of(rows), first)
        far_end.end()
        await far_end.start()
    assert [(block.first_sequence, block.frame_count) for block in far_end.blocks] == [(7, 2), (100, 1), (5, 3)]
    for block, rows in zip(far_end.blocks, (slice(0, 2), slice(2, 3), slice(3, 6)), strict=True):
        check_rows(block.result, PIXELS[rows])


async def test_frame_numbers_that_do_not_fit_are_refused_in_their_place(
    model: Model, golden_files: list[bytes]
) -> None:
    async with serving(model) as service:
        far_end = Conversation(service)
        far_end.send(files(golden_files[0], b"bad"), 2**64 - 1)
        far_end.send(request_of(0), 5)
        far_end.end()
        await far_end.start()
    refused, answered = far_end.blocks
    assert refused.error.field == "first_sequence"
    assert "2^64" in refused.error.message
    assert answered.WhichOneof("outcome") == "result"


async def test_live_frames_that_newer_ones_overtake_are_told_and_not_computed(held_model: Model) -> None:
    observer = DroppedFrames()
    async with serving(held_model, observer) as service:
        far_end = Conversation(service)
        far_end.send(request_of(0), latest_only=True)
        task = far_end.start()
        await held_model.begun()
        for n in range(1, 6):
            far_end.send(request_of(n))
        await far_end.all_read()
        held_model.let_go(2)
        await far_end.answered(6)
        far_end.send(request_of(6))
        far_end.end()
        held_model.let_go()
        await task
    outcomes = {block.first_sequence: block for block in far_end.blocks}
    assert [block.first_sequence for block in far_end.blocks] == list(range(7)), "in order, each exactly once"
    assert [n for n, block in outcomes.items() if block.WhichOneof("outcome") == "result"] == [0, 5, 6]
    assert {outcomes[n].error.code for n in range(1, 5)} == {10}
    assert "newer frame" in outcomes[1].error.message
    assert held_model.batches == [1, 1, 1]
    assert observer.frames == 4
    check_rows(outcomes[5].result, PIXELS[5:6])


async def test_frames_of_an_ordinary_stream_are_all_computed(held_model: Model) -> None:
    async with serving(held_model) as service:
        far_end = Conversation(service)
        far_end.send(request_of(0))
        task = far_end.start()
        await held_model.begun()
        for n in range(1, 6):
            far_end.send(request_of(n))
        await far_end.all_read()
        far_end.end()
        held_model.let_go(6)
        await task
    assert [block.WhichOneof("outcome") for block in far_end.blocks] == ["result"] * 6


async def test_a_stream_holds_a_bounded_number_of_bytes(held_model: Model) -> None:
    """Whatever the number of frames: 1 image may be a file of megabytes."""
    size = 8 * 784
    async with serving(held_model, max_message_bytes=size) as service:
        far_end = Conversation(service)
        for n in range(6):
            far_end.send(request_of(slice(8 * n, 8 * n + 8)))
        far_end.end()
        task = far_end.start()
        await held_model.begun()
        await idle()
        assert far_end.reads == 3, "two messages are within the window, and the third is held back"
        held_model.let_go(6)
        await task
    assert sum(block.frame_count for block in far_end.blocks) == 48


async def test_an_empty_stream_ends_without_an_answer(model: Model) -> None:
    async with serving(model) as service:
        far_end = Conversation(service)
        far_end.end()
        await far_end.start()
    assert far_end.blocks == []


async def test_a_slow_first_frame_keeps_its_place(
    model: Model,
    golden: tuple[npt.NDArray[np.uint8], list[int]],
    golden_files: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, go = threading.Event(), threading.Event()

    def slow_decode(file: bytes) -> Any:
        begun.set()
        assert go.wait(20)
        return decode(file)

    monkeypatch.setattr(server.service, "decode", slow_decode)
    async with serving(model) as service:
        far_end = Conversation(service)
        far_end.send(files(golden_files[0]))
        for n in range(1, 10):
            far_end.send(request_of(n))
        task = far_end.start()
        assert await asyncio.to_thread(begun.wait, 20)
        await far_end.all_read()
        await idle()
        assert sum(model.batches) == 9
        assert far_end.blocks == []
        go.set()
        await far_end.answered(10)
        far_end.end()
        await task
    assert [block.first_sequence for block in far_end.blocks] == list(range(10))
    check_rows(far_end.blocks[0].result, golden[0][:1])
    assert far_end.messages == [10], "answers that are ready together travel together"


async def test_one_stream_alone_fills_batches(held_model: Model) -> None:
    async with serving(held_model) as service:
        far_end = Conversation(service)
        for n in range(64):
            far_end.send(request_of(n))
        task = far_end.start()
        await held_model.begun()
        await far_end.all_read()
        await idle()
        held_model.let_go(2)
        await far_end.answered(64)
        far_end.end()
        await task
    assert sum(held_model.batches) == 64
    assert len(held_model.batches) <= 2
    assert [block.first_sequence for block in far_end.blocks] == list(range(64))


async def test_a_stream_does_not_read_past_its_window(held_model: Model) -> None:
    async with serving(held_model, stream_window=4) as service:
        far_end = Conversation(service)
        for n in range(20):
            far_end.send(request_of(n))
        task = far_end.start()
        await held_model.begun()
        await idle()
        assert far_end.reads <= 4 + 1, "one more message may be in hand"
        held_model.let_go(100)
        await far_end.answered(20)
        far_end.end()
        await task
    assert sum(held_model.batches) == 20
    assert max(held_model.batches) <= 4


async def test_a_message_larger_than_the_window_goes_alone(held_model: Model) -> None:
    async with serving(held_model, stream_window=4) as service:
        far_end = Conversation(service)
        for rows in (slice(0, 2), slice(2, 12), slice(12, 13)):
            far_end.send(request_of(rows))
        far_end.end()
        task = far_end.start()
        await held_model.begun()
        await idle()
        held_model.let_go(3)
        await asyncio.wait_for(task, 20)
    assert held_model.batches == [2, 10, 1]
    assert [(block.first_sequence, block.frame_count) for block in far_end.blocks] == [(0, 2), (2, 10), (12, 1)]


async def test_a_bad_frame_is_answered_in_its_place_and_the_stream_goes_on(model: Model) -> None:
    async with serving(model) as service:
        far_end = Conversation(service)
        for frames in (request_of(0), pb.ClassifyRequest(pixels=bytes(783)), pb.ClassifyRequest(), request_of(1)):
            far_end.send(frames)
        far_end.end()
        await far_end.start()
    good, short, empty, last = far_end.blocks
    assert [block.first_sequence for block in far_end.blocks] == [0, 1, 2, 3]
    assert [block.WhichOneof("outcome") for block in far_end.blocks] == ["result", "error", "error", "result"]
    check_rows(good.result, PIXELS[:1])
    check_rows(last.result, PIXELS[1:2])
    assert (short.error.code, short.error.field) == (3, "pixels")
    assert "783 bytes" in short.error.message
    assert (empty.error.code, empty.error.field) == (3, "images")


async def test_a_message_that_is_no_whole_number_of_frames_is_answered_for_all_of_them(model: Model) -> None:
    async with serving(model) as service:
        far_end = Conversation(service)
        far_end.send(pb.ClassifyRequest(pixels=bytes(3 * 784 + 1)), first=10)
        far_end.end()
        await far_end.start()
    (block,) = far_end.blocks
    assert (block.first_sequence, block.frame_count, block.error.code) == (10, 4, 3)


@pytest.mark.parametrize("bad", [{0}, {2}, {4}, {1, 2}, {0, 4}, {1, 3}, {0, 1, 2, 3, 4}], ids=str)
@pytest.mark.parametrize("form", ["features", "encoded"])
async def test_bad_frames_among_good_ones_stand_in_their_places(
    form: str, bad: set[int], model: Model, golden: tuple[npt.NDArray[np.uint8], list[int]], golden_files: list[bytes]
) -> None:
    if form == "features":
        features = ((golden[0][:5] / 255 - 0.5) / 0.5).astype("<f4")
        features[sorted(bad), 7] = np.nan
        frames = pb.ClassifyRequest(features=features.tobytes())
    else:
        frames = files(*(b"bad" if n in bad else golden_files[n] for n in range(5)))
    async with serving(model, max_batch_size=2) as service:
        far_end = Conversation(service)
        far_end.send(frames, first=1000)
        far_end.end()
        await far_end.start()
    answered: list[int] = []
    for block in far_end.blocks:
        numbers = [block.first_sequence - 1000 + n for n in range(block.frame_count)]
        answered += numbers
        if block.WhichOneof("outcome") == "error":
            assert len(numbers) == 1
            assert bad.issuperset(numbers)
            assert block.error.code == 3
            assert block.error.field == ("features" if form == "features" else f"encoded.files[{numbers[0]}]")
        else:
            assert bad.isdisjoint(numbers)
            check_rows(block.result, golden[0][numbers])
    assert answered == [0, 1, 2, 3, 4]


async def test_a_frame_that_meets_a_full_queue_is_told_so_and_the_stream_goes_on(held_model: Model) -> None:
    async with serving(held_model, max_queue_size=4) as service:
        far_end = Conversation(service)
        far_end.send(request_of(0))
        task = far_end.start()
        await held_model.begun()
        far_end.send(request_of(slice(1, 5)))
        far_end.send(request_of(slice(5, 7)))
        await far_end.all_read()
        await idle()
        held_model.let_go(3)
        await far_end.answered(7)
        far_end.send(request_of(7))
        far_end.end()
        await task
    assert [block.error.code for block in far_end.blocks] == [0, 0, 8, 0]
    assert [block.frame_count for block in far_end.blocks] == [1, 4, 2, 1]


async def test_a_bug_in_one_frames_batch_is_told_in_its_place(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(model) as service:
        far_end = Conversation(service)
        far_end.send(request_of(0))
        task = far_end.start()
        await far_end.answered(1)
        with monkeypatch.context() as patch:
            patch.setattr(model, "predict", lambda rows: 1 / 0)
            far_end.send(request_of(1))
            await far_end.answered(2)
        far_end.send(request_of(2))
        far_end.end()
        await task
    _, broken, last = far_end.blocks
    assert broken.error.code == 13
    assert broken.error.incident_id in broken.error.message
    assert "division" not in broken.error.message
    check_rows(last.result, PIXELS[2:3])


async def test_a_fault_of_the_transport_is_no_python_text_either(model: Model) -> None:
    async def read() -> pb.StreamClassifyRequest | None:
        raise RuntimeError("secret")

    async def write(_: pb.StreamClassifyResponse) -> None:
        raise AssertionError

    async with serving(model) as service:
        with pytest.raises(ServiceError) as error:
            await service.stream_classify(read, write)
    assert "secret" not in str(error.value)


async def test_a_stream_has_one_deadline_for_all_its_frames(held_model: Model) -> None:
    async with serving(held_model) as service:
        far_end = Conversation(service)
        far_end.send(request_of(0))
        far_end.send(request_of(1))
        far_end.end()
        await far_end.start(timeout=0)
    assert [block.error.code for block in far_end.blocks] == [4, 4]
    assert held_model.batches == []


async def test_draining_answers_what_was_read_and_then_ends_the_stream(held_model: Model) -> None:
    async with serving(held_model) as service:
        far_end = Conversation(service)
        for n in range(3):
            far_end.send(request_of(n))
        task = far_end.start()
        await held_model.begun()
        await far_end.all_read()
        service.drain()
        await idle()
        assert not task.done()
        held_model.let_go(2)
        with pytest.raises(NotServing, match="about to stop"):
            await task
    assert [block.first_sequence for block in far_end.blocks] == [0, 1, 2]
    assert sum(held_model.batches) == 3


async def test_draining_ends_an_idle_stream_at_once(model: Model) -> None:
    async with serving(model) as service:
        far_end = Conversation(service)
        task = far_end.start()
        await far_end.all_read()
        service.drain()
        with pytest.raises(NotServing):
            await asyncio.wait_for(task, 20)


async def test_a_stream_that_was_complete_when_draining_began_ends_well(held_model: Model) -> None:
    async with serving(held_model) as service:
        far_end = Conversation(service)
        far_end.send(request_of(0))
        far_end.end()
        task = far_end.start()
        await held_model.begun()
        await idle()
        service.drain()
        held_model.let_go()
        await task
    assert len(far_end.blocks) == 1


async def test_a_stream_that_is_opened_after_draining_began_ends_too(model: Model) -> None:
    async with serving(model) as service:
        service.drain()
        task = Conversation(service).start()
        done, _ = await asyncio.wait({task}, timeout=2)
        task.cancel()
        assert done, "it would use up the whole grace"
        assert isinstance(task.exception(), NotServing)


async def test_cancelling_a_stream_cancels_its_work(held_model: Model) -> None:
    async with serving(held_model, max_queue_size=10) as service:
        running = asyncio.create_task(service.classify(request_of(0)))
        await held_model.begun()
        far_end = Conversation(service)
        for n in range(10):
            far_end.send(request_of(n))
        task = far_end.start()
        await far_end.all_read()
        await idle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        kept = asyncio.create_task(service.classify(request_of(slice(0, 10))))
        await idle()
        held_model.let_go(2)
        await running
        check_rows(await kept, PIXELS[:10])
    assert held_model.batches == [1, 10]
    assert far_end.blocks == []


async def test_a_stream_whose_far_end_is_gone_ends_and_frees_its_work(held_model: Model) -> None:
    async with serving(held_model) as service:
        far_end = Conversation(service)
        for n in range(5):
            far_end.send(request_of(n))

        async def write(_: pb.StreamClassifyResponse) -> None:
            raise ConnectionResetError

        task = asyncio.create_task(service.stream_classify(far_end._read, write))
        await held_model.begun()
        await far_end.all_read()
        await idle()
        held_model.let_go(2)
        done, _ = await asyncio.wait({task}, timeout=20)
        assert done
        assert task.exception() is not None


class Refused(Observer):
    """Remembers what was refused."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.rows: list[tuple[str, int]] = []

    def call_ended(self, method: str, code: str, seconds: float) -> None:
        if code == "RESOURCE_EXHAUSTED":
            self.calls.append((method, code))

    def rejected(self, reason: str, rows: int) -> None:
        self.rows.append((reason, rows))


@asynccontextmanager
async def waiting_calls(service: DigitService, count: int, images: int) -> AsyncIterator[None]:
    """So many calls stand in the queue, in a window."""
    tasks = [asyncio.create_task(service.classify(request_of(slice(0, images)))) for _ in range(count)]
    await asyncio.sleep(0)
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_call_like_the_last_ones_is_refused_unread_if_there_will_be_no_room_for_it() -> None:
    refused = Refused()
    async with (
        serving(Model(), refused, max_queue_size=256, max_wait_ms=60_000) as service,
        waiting_calls(service, 30, 8),  # 240 rows
    ):
        assert service.announce("first", "some/Method") is None
        error = service.announce("second", "some/Method")
        assert error is None, "248 with the first, 256 with this one"
        error = service.announce("third", "some/Method")
        assert isinstance(error, Overloaded)
        assert "the queue holds 240 of at most 256 rows, and 2 calls are being read" in str(error)
        assert (error.retry_after_seconds or 0) > 0
        assert refused.calls == [("some/Method", "RESOURCE_EXHAUSTED")]
        assert refused.rows == [("queue_full", 8)]
        service.arrived("first")
        assert service.announce("fourth", "some/Method") is None


async def test_no_call_is_refused_unread_for_the_size_of_others() -> None:
    async with (
        serving(Model(), max_queue_size=256, max_wait_ms=60_000) as service,
        waiting_calls(service, 30, 8),
        waiting_calls(service, 1, 1),  # so the next one may be as small
    ):
        for number in range(15):
            assert service.announce(number, "some/Method") is None
        assert service.announce("no row is left", "some/Method") is not None


async def test_calls_that_are_announced_and_never_sent_refuse_nobody() -> None:
    async with serving(Model(), max_queue_size=256, max_wait_ms=60_000) as service:
        for _ in range(RECENT_CALLS):
            async with waiting_calls(service, 1, 256):
                pass
        for number in range(1000):
            assert service.announce(number, "some/Method") is None
