"""The whole server in this process, asked over the wire."""

from __future__ import annotations

import asyncio
import io
import socket
import struct
import threading
import zlib
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
import torch
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from PIL import Image

import server.service
from digits.checkpoint import load_checkpoint
from digits.preprocessing import normalize
from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1 import digit_classifier_pb2_grpc as pb_grpc
from server.app import DigitServer, build_server
from server.errors import ServiceError
from server.inference import Classifier, Scores
from server.inputs import Rows
from server.service import DigitService
from server.settings import MODELS, Settings

Golden = tuple[npt.NDArray[np.uint8], list[int]]

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE = "mnist.v1.DigitClassifier"
TIMEOUT = 30


@asynccontextmanager
async def server_of(*, loaded: bool = True, **settings: Any) -> AsyncIterator[tuple[DigitServer, str]]:
    digit_server, port = build_server(Settings(port=0, **settings))
    await digit_server.start()
    try:
        if loaded:
            await digit_server.load()
        yield digit_server, f"127.0.0.1:{port}"
    finally:
        await digit_server.stop(grace=0)


@pytest.fixture
async def channel(running_server: str) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(running_server) as channel:
        yield channel


def classifier_at(channel: grpc.aio.Channel) -> Any:
    return pb_grpc.DigitClassifierStub(channel)


def health_at(channel: grpc.aio.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)


def pixels(rows: npt.NDArray[np.uint8], **fields: Any) -> pb.ClassifyRequest:
    return pb.ClassifyRequest(pixels=rows.tobytes(), **fields)


def encoded(*files: bytes) -> pb.ClassifyRequest:
    return pb.ClassifyRequest(encoded=pb.EncodedImages(files=files))


def check_digits(response: pb.ClassifyResponse, labels: list[int]) -> None:
    """A model need not read all golden digits, only nine of ten (server.inference)."""
    right = sum(digit == label for digit, label in zip(response.digits, labels, strict=True))
    assert right >= 0.9 * len(labels)


def detail_of(error: grpc.aio.AioRpcError, detail: Message) -> Any:
    """The one detail of the error's rich status, which is to be of this kind."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert (status.code, status.message) == (error.code().value[0], error.details())
    (packed,) = status.details
    assert packed.Unpack(detail)
    return detail


def metadata_of(error: grpc.aio.AioRpcError) -> dict[str, str | bytes]:
    return dict(error.trailing_metadata())


async def arrived(classifier: Any) -> None:
    """Wait until the calls made before have arrived: the server accepts calls in the order in which they come."""
    for _ in range(5):
        await classifier.GetModel(pb.GetModelRequest(), timeout=TIMEOUT)


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


def png(width: int, height: int, scanlines: bytes = b"") -> bytes:
    """A grey PNG whose header says this size, whatever it holds."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(scanlines)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def animated_gif() -> bytes:
    first, second = Image.new("L", (28, 28)), Image.new("L", (28, 28), 255)
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=[second])
    return buffer.getvalue()


# The three methods -----------------------------------------------------------------


async def test_classify_reads_golden_digits(channel: grpc.aio.Channel, golden: Golden) -> None:
    response = await classifier_at(channel).Classify(pixels(golden[0]), timeout=TIMEOUT)
    check_digits(response, golden[1])
    rows = np.array(response.probabilities).reshape(20, 10)
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-5)
    assert rows.argmax(axis=1).tolist() == list(response.digits)
    assert len(response.logits) == 0
    assert response.receipt.batch_rows == 20
    assert response.receipt.compute_time.ToNanoseconds() > 0


async def test_pixels_features_and_files_are_read_alike(
    channel: grpc.aio.Channel, golden: Golden, golden_files: list[bytes]
) -> None:
    classifier = classifier_at(channel)
    model = await classifier.GetModel(pb.GetModelRequest(), timeout=TIMEOUT)
    features = (golden[0] / np.float32(255) - model.normalization_mean) / model.normalization_std
    answers = [
        await classifier.Classify(request, timeout=TIMEOUT)
        for request in (
            pixels(golden[0], include_logits=True),
            pb.ClassifyRequest(features=features.astype("<f4").tobytes(), include_logits=True),
            pb.ClassifyRequest(encoded=pb.EncodedImages(files=golden_files), include_logits=True),
        )
    ]
    assert len(answers[0].logits) == 200
    for other in answers[1:]:
        assert other.digits == answers[0].digits
        np.testing.assert_allclose(other.logits, answers[0].logits, rtol=1e-3, atol=1e-3)


async def test_a_stream_is_answered_in_order(channel: grpc.aio.Channel, golden: Golden) -> None:
    call = classifier_at(channel).StreamClassify(timeout=TIMEOUT)
    for number in range(200):
        await call.write(
            pb.StreamClassifyRequest(first_sequence=number, frames=pixels(golden[0][number % 20 : number % 20 + 1]))
        )
    await call.done_writing()
    blocks = [block async for response in call for block in response.blocks]
    # A block is of one frame or of several that follow each other, also of several messages.
    assert [block.first_sequence + i for block in blocks for i in range(block.frame_count)] == list(range(200))
    assert await call.code() == grpc.StatusCode.OK
    whole = await classifier_at(channel).Classify(pixels(golden[0]), timeout=TIMEOUT)
    assert [digit for block in blocks for digit in block.result.digits] == list(whole.digits) * 10


async def test_a_bad_frame_over_the_wire_is_answered_in_its_place(channel: grpc.aio.Channel, golden: Golden) -> None:
    call = classifier_at(channel).StreamClassify(timeout=TIMEOUT)
    for number, frames in enumerate((pixels(golden[0][:1]), encoded(b"no image"), pixels(golden[0][1:2]))):
        await call.write(pb.StreamClassifyRequest(first_sequence=number, frames=frames))
    await call.done_writing()
    blocks = [block async for response in call for block in response.blocks]
    assert [block.error.code for block in blocks] == [0, 3, 0]
    assert blocks[1].error.field == "encoded.files[0]"
    assert await call.code() == grpc.StatusCode.OK


async def test_a_cancelled_stream_leaves_the_server_as_it_was(channel: grpc.aio.Channel, golden: Golden) -> None:
    classifier = classifier_at(channel)
    for _ in range(20):
        call = classifier.StreamClassify(timeout=TIMEOUT)
        await call.write(pb.StreamClassifyRequest(frames=pixels(golden[0])))
        await call.read()
        call.cancel()
        assert await call.code() == grpc.StatusCode.CANCELLED
    check_digits(await classifier.Classify(pixels(golden[0]), timeout=TIMEOUT), golden[1])


async def test_get_model_describes_the_embedded_weights(channel: grpc.aio.Channel) -> None:
    model = await classifier_at(channel).GetModel(pb.GetModelRequest(), timeout=TIMEOUT)
    assert model.name == "mnist"
    assert model.architecture == "ImprovedNN"
    assert model.parameter_count == 235_146
    assert len(model.weights_sha256) == 64
    assert model.weights_sha256.startswith(model.version)
    assert list(model.labels) == list("0123456789")


async def test_the_other_embedded_model_reads_the_golden_digits_as_plain_torch_does(golden: Golden) -> None:
    checkpoint = load_checkpoint(MODELS["cnn"])
    manifest = checkpoint.manifest
    with torch.inference_mode():
        expected = checkpoint.network(torch.from_numpy(normalize(golden[0], manifest.mean, manifest.std))).numpy()
    async with server_of(model="CNN") as (_, address), grpc.aio.insecure_channel(address) as channel:
        model = await classifier_at(channel).GetModel(pb.GetModelRequest(), timeout=TIMEOUT)
        response = await classifier_at(channel).Classify(pixels(golden[0], include_logits=True), timeout=TIMEOUT)
        (one,) = (await classifier_at(channel).Classify(pixels(golden[0][7:8]), timeout=TIMEOUT)).digits
    assert (model.architecture, model.version) == ("CNN", checkpoint.version)
    assert one == response.digits[7]
    check_digits(response, golden[1])
    np.testing.assert_allclose(np.reshape(response.logits, (-1, 10)), expected, rtol=1e-3, atol=1e-3)


# Health and reflection ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["", SERVICE])
async def test_health_is_told_and_pushed_from_loading_to_stopping(name: str) -> None:
    async with server_of(loaded=False) as (digit_server, address), grpc.aio.insecure_channel(address) as channel:
        health = health_at(channel)
        request = health_pb2.HealthCheckRequest(service=name)
        watch = health.Watch(request, timeout=TIMEOUT)
        assert (await watch.read()).status == NOT_SERVING
        assert (await health.Check(request, timeout=TIMEOUT)).status == NOT_SERVING
        await digit_server.load()
        assert (await watch.read()).status == SERVING
        assert (await health.Check(request, timeout=TIMEOUT)).status == SERVING
        stopping = asyncio.create_task(digit_server.stop(grace=5))
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()
        await stopping


async def test_health_knows_no_other_service(channel: grpc.aio.Channel) -> None:
    error = await refusal(health_at(channel).Check(health_pb2.HealthCheckRequest(service="chess"), timeout=TIMEOUT))
    assert error.code() == grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_services_and_describes_ours(channel: grpc.aio.Channel) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]
    call = stub.ServerReflectionInfo(timeout=TIMEOUT)
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    listed = await call.read()
    names = {service.name for service in listed.list_services_response.service}
    assert names == {
        SERVICE,
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE))
    described = await call.read()
    assert b"StreamClassify" in described.file_descriptor_response.file_descriptor_proto[0]
    await call.done_writing()
    assert await call.read() == grpc.aio.EOF


# Errors ----------------------------------------------------------------------------------


async def test_before_the_model_is_loaded_every_method_is_unavailable(golden: Golden) -> None:
    async with server_of(loaded=False) as (digit_server, address), grpc.aio.insecure_channel(address) as channel:
        classifier = classifier_at(channel)
        stream = classifier.StreamClassify(timeout=TIMEOUT)
        await stream.done_writing()
        for call in (
            classifier.Classify(pixels(golden[0]), timeout=TIMEOUT),
            classifier.GetModel(pb.GetModelRequest(), timeout=TIMEOUT),
            stream.read(),
        ):
            error = await refusal(call)
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            assert error.details() == "the model is not loaded yet"
        await digit_server.load()
        check_digits(await classifier.Classify(pixels(golden[0]), timeout=TIMEOUT), golden[1])


def bad_requests() -> dict[str, tuple[pb.ClassifyRequest, str, str]]:
    """Request, field, and the words of the message that tell rule and value."""
    noise = np.random.default_rng(0).bytes(5_000_000)
    nan = np.zeros((3, 784), "<f4")
    nan[1, 5] = np.nan
    digit = png(40, 40, b"".join(b"\0" + bytes(40) if y % 20 else b"\0" + b"\xff" * 40 for y in range(40)))
    too_long = ("images", "at most 4194304 bytes")
    first = "encoded.files[0]"
    return {
        "none of the oneof": (pb.ClassifyRequest(), "images", "exactly one of pixels, features and encoded"),
        "0 bytes of pixels": (pb.ClassifyRequest(pixels=b""), "pixels", "1 or more images, this one carries 0"),
        "0 bytes of features": (pb.ClassifyRequest(features=b""), "features", "1 or more images, this one carries 0"),
        "0 files": (encoded(), "encoded.files", "1 or more images, this one carries 0"),
        "783 bytes": (pb.ClassifyRequest(pixels=bytes(783)), "pixels", "783 bytes are no whole number of images"),
        "785 bytes": (pb.ClassifyRequest(pixels=bytes(785)), "pixels", "785 bytes are no whole number of images"),
        "3135 bytes": (pb.ClassifyRequest(features=bytes(3135)), "features", "3135 bytes are no whole number of"),
        "NaN features": (pb.ClassifyRequest(features=nan.tobytes()), "features", "image 1 holds nan at position 5"),
        "5 MB of noise as pixels": (pb.ClassifyRequest(pixels=noise), *too_long),
        "5 MB of noise as features": (pb.ClassifyRequest(features=noise), *too_long),
        "5 MB of noise as a file": (encoded(noise), *too_long),
        "4 MB of noise as a file": (encoded(noise[:4_000_000]), first, "the file is no "),
        "an empty file": (encoded(b""), first, "the file is empty (0 bytes)"),
        "a text file": (encoded(b"Dear server,\nplease read this: 7\n"), first, "the file is no "),
        "a truncated PNG": (encoded(digit[: len(digit) // 2]), first, "the file "),
        "a PNG without pixels": (encoded(png(40, 40)), first, "the file "),
        "a blank image": (encoded(png(28, 28, bytes(29 * 28))), first, "contrast"),
        "1x1": (encoded(png(1, 1, b"\0\xff")), first, "this one is 1x1"),
        "20000x20000": (encoded(png(20_000, 20_000)), first, "400000000"),
        "10000x10000": (encoded(png(10_000, 10_000)), first, "10000"),
        "an animated GIF": (encoded(animated_gif()), first, "single frame, the file (GIF) has several"),
        "a bad file among good ones": (encoded(digit, b"", digit), "encoded.files[1]", "the file is empty (0 bytes)"),
    }


@pytest.fixture(scope="module")
def bad() -> dict[str, tuple[pb.ClassifyRequest, str, str]]:
    return bad_requests()


@pytest.mark.parametrize("name", list(bad_requests()))
async def test_bad_input_is_refused_with_rule_and_value_and_harms_no_neighbour(
    name: str, bad: dict[str, tuple[pb.ClassifyRequest, str, str]], channel: grpc.aio.Channel, golden: Golden
) -> None:
    request, field, words = bad[name]
    classifier = classifier_at(channel)
    neighbours = [classifier.Classify(pixels(golden[0]), timeout=TIMEOUT) for _ in range(10)]
    bad_call = classifier.Classify(request, timeout=TIMEOUT)
    neighbours += [classifier.Classify(pixels(golden[0]), timeout=TIMEOUT) for _ in range(10)]
    error = await refusal(bad_call)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    message = error.details() or ""
    assert message.startswith(f"{field}: ")
    assert words in message
    assert len(message) < 500
    (violation,) = detail_of(error, error_details_pb2.BadRequest()).field_violations
    assert (violation.field, violation.description) == (field, message)
    for neighbour in neighbours:
        check_digits(await neighbour, golden[1])


async def test_a_message_far_beyond_the_limit_is_refused_by_the_transport(channel: grpc.aio.Channel) -> None:
    error = await refusal(
        classifier_at(channel).Classify(pb.ClassifyRequest(pixels=bytes(20_000_000)), timeout=TIMEOUT)
    )
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("method", ["Classify", "StreamClassify"])
async def test_bytes_that_are_no_message_are_refused_without_python_text(
    method: str, channel: grpc.aio.Channel, golden: Golden
) -> None:
    path = f"/{SERVICE}/{method}"
    if method == "Classify":
        unary: Any = channel.unary_unary(path)
        error = await refusal(unary(b"\xff\xff\xff", timeout=TIMEOUT))
    else:
        call: Any = channel.stream_stream(path)(timeout=TIMEOUT)
        await call.write(b"\xff\xff\xff")
        error = await refusal(call.read())
    assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL)
    details = error.details() or ""
    assert "DecodeError" not in details
    assert "class" not in details
    check_digits(await classifier_at(channel).Classify(pixels(golden[0]), timeout=TIMEOUT), golden[1])


async def test_no_call_that_was_announced_is_waited_for_when_it_is_over(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced: list[Hashable] = []
    known = asyncio.Event()
    announce = DigitService.announce

    def remembered(service: DigitService, call: Hashable, method: str) -> ServiceError | None:
        announced.append(call)
        known.set()
        return announce(service, call, method)

    over: list[Hashable] = []
    here = DigitService.arrived

    def remembered_too(service: DigitService, call: Hashable) -> None:
        over.append(call)
        here(service, call)

    monkeypatch.setattr(DigitService, "announce", remembered)
    monkeypatch.setattr(DigitService, "arrived", remembered_too)

    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.sleep(TIMEOUT)
        yield b""

    async with server_of() as (_, address), grpc.aio.insecure_channel(address) as channel:
        classifier = classifier_at(channel)
        await classifier.Classify(pixels(golden[0]), timeout=TIMEOUT)
        await refusal(classifier.Classify(pb.ClassifyRequest(), timeout=TIMEOUT))
        raw: Any = channel.unary_unary(f"/{SERVICE}/Classify")
        await refusal(raw(b"\xff", timeout=TIMEOUT))
        await refusal(classifier.Classify(pb.ClassifyRequest(pixels=bytes(20_000_000)), timeout=TIMEOUT))
        silent: Any = channel.stream_unary(f"/{SERVICE}/Classify")  # its headers come, and nothing else
        error = await refusal(silent(nothing(), timeout=0.05))
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        known.clear()
        left = silent(nothing(), timeout=TIMEOUT)
        await known.wait()
        left.cancel()
        await arrived(classifier)
    assert len(set(announced)) >= 6
    assert set(announced) <= set(over)


async def test_a_bug_ends_in_internal_with_an_incident_and_no_python_text(
    channel: grpc.aio.Channel, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Classifier, rows: object) -> None:
        raise RuntimeError("secret tensor")

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "predict", broken)
        error = await refusal(classifier_at(channel).Classify(pixels(golden[0]), timeout=TIMEOUT))
    assert error.code() == grpc.StatusCode.INTERNAL
    incident = metadata_of(error)["incident-id"]
    assert incident
    assert str(incident) in (error.details() or "")
    assert "secret" not in (error.details() or "")
    check_digits(await classifier_at(channel).Classify(pixels(golden[0]), timeout=TIMEOUT), golden[1])


async def test_a_full_queue_is_refused_at_once_with_hints_when_to_try_again(golden: Golden) -> None:
    async with (
        server_of(max_wait_ms=60_000, max_queue_size=2) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        classifier = classifier_at(channel)
        waiting = classifier.Classify(pixels(golden[0][:2]), timeout=TIMEOUT)  # in a window of a minute
        await arrived(classifier)
        error = await refusal(classifier.Classify(pixels(golden[0][:1]), timeout=TIMEOUT))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        words = "the queue holds 2 of at most 2 rows, and 0 calls are being read: no room for one like the last ones"
        assert error.details() == words
        delay = detail_of(error, error_details_pb2.RetryInfo()).retry_delay
        pushback = metadata_of(error)["grpc-retry-pushback-ms"]
        assert delay.ToMilliseconds() == int(pushback) > 0
        health = await health_at(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=TIMEOUT)
        assert health.status == SERVING
        assert not waiting.done()
        waiting.cancel()


async def test_a_call_whose_deadline_passes_makes_room_in_the_queue(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()
    run_batch = Classifier.run_batch

    def held(self: Classifier, blocks: Sequence[Rows]) -> list[Scores]:
        begun.set()
        assert go.wait(TIMEOUT)
        return run_batch(self, blocks)

    monkeypatch.setattr(server.service, "INLINE_SIZE", 0)
    monkeypatch.setattr(Classifier, "run_batch", held)
    async with server_of(max_queue_size=20) as (_, address), grpc.aio.insecure_channel(address) as channel:
        classifier = classifier_at(channel)
        running = classifier.Classify(pixels(golden[0][:1]), timeout=TIMEOUT)
        assert await asyncio.to_thread(begun.wait, TIMEOUT)
        error = await refusal(classifier.Classify(pixels(golden[0][:1]), timeout=0.2))
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        waiting = classifier.Classify(pixels(golden[0]), timeout=TIMEOUT)
        await arrived(classifier)
        while waiting.done():  # refused: the server learns of the deadline a moment after us
            waiting = classifier.Classify(pixels(golden[0]), timeout=TIMEOUT)
            await arrived(classifier)
        go.set()
        await running
        assert (await waiting).receipt.batch_rows == 20


# Binding and stopping ----------------------------------------------------------------------


async def test_a_taken_port_fails_with_its_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"^cannot listen on 127\.0\.0\.1:{port}: the address is taken"):
            build_server(Settings(port=port))


async def test_two_servers_do_not_share_a_port() -> None:
    async with server_of(loaded=False) as (digit_server, _):
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{digit_server.port}"):
            build_server(Settings(port=digit_server.port))


async def test_an_address_of_another_machine_cannot_be_bound() -> None:
    with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.1:"):
        build_server(Settings(host="192.0.2.1", port=0))


async def test_stopping_finishes_an_accepted_call(golden: Golden) -> None:
    async with server_of(max_wait_ms=300) as (digit_server, address), grpc.aio.insecure_channel(address) as channel:
        classifier = classifier_at(channel)
        accepted = classifier.Classify(pixels(golden[0]), timeout=TIMEOUT)
        await arrived(classifier)
        await digit_server.stop(grace=TIMEOUT)
        check_digits(await accepted, golden[1])
        error = await refusal(classifier.Classify(pixels(golden[0]), timeout=TIMEOUT))
        assert error.code() == grpc.StatusCode.UNAVAILABLE


async def test_stopping_does_not_wait_for_a_window_to_close(golden: Golden) -> None:
    async with server_of(max_wait_ms=60_000) as (digit_server, address), grpc.aio.insecure_channel(address) as channel:
        classifier = classifier_at(channel)
        accepted = classifier.Classify(pixels(golden[0]), timeout=TIMEOUT)
        await arrived(classifier)
        await digit_server.stop(grace=3)
        check_digits(await accepted, golden[1])


@pytest.mark.parametrize("kind", ["stream", "health watch", "reflection"])
async def test_an_idle_stream_does_not_use_up_the_grace(kind: str, golden: Golden) -> None:
    async with server_of() as (digit_server, address), grpc.aio.insecure_channel(address) as channel:
        call: Any
        if kind == "stream":
            call = classifier_at(channel).StreamClassify(timeout=TIMEOUT)
            await call.write(pb.StreamClassifyRequest(frames=pixels(golden[0])))
        elif kind == "health watch":
            call = health_at(channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
        else:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]
            call = stub.ServerReflectionInfo(timeout=TIMEOUT)
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        await call.read()
        stopping = asyncio.create_task(digit_server.stop(grace=TIMEOUT))
        done, _ = await asyncio.wait({stopping}, timeout=3)
        call.cancel()
        await stopping
        assert done


async def test_a_drained_stream_ends_unavailable_after_its_answers(golden: Golden) -> None:
    async with server_of() as (digit_server, address), grpc.aio.insecure_channel(address) as channel:
        call = classifier_at(channel).StreamClassify(timeout=TIMEOUT)
        await call.write(pb.StreamClassifyRequest(first_sequence=3, frames=pixels(golden[0])))
        response = await call.read()
        assert response.blocks[0].first_sequence == 3
        await digit_server.stop(grace=TIMEOUT)
        error = await refusal(call.read())
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "about to stop" in (error.details() or "")


async def test_a_server_may_be_stopped_twice(golden: Golden) -> None:
    async with server_of() as (digit_server, address), grpc.aio.insecure_channel(address) as channel:
        await classifier_at(channel).Classify(pixels(golden[0]), timeout=TIMEOUT)
        await digit_server.stop(grace=0)
        await digit_server.stop(grace=0)
