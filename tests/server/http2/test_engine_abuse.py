"""Clients of an engine that keep to no rule: each broken frame gets its error, and floods an end."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import settings as options
from hypothesis import strategies as st

from server.http2.engine import (
    COMPRESSION_ERROR,
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    MAX_CONTINUATIONS,
    MAX_FRAME_BYTES,
    MAX_IDLE_FRAMES,
    PREFACE,
    PROTOCOL_ERROR,
    STREAM_CLOSED,
    STREAM_WINDOW,
    Engine,
    ProtocolBroken,
)
from server.http2.hpack import encode
from server.http2.wire import Header
from tests.server.http2.peer import (
    ACK,
    CONTINUATION,
    DATA,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW,
    MAX_FRAME,
    PADDED,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    REQUEST,
    REQUEST_BLOCK,
    RST_STREAM,
    SETTINGS,
    START,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    Server,
    frame,
    in_pieces,
    outcome,
    request,
    reset,
    settings,
    started,
    window,
)

OPEN = START + request(1)
BEGUN = frame(HEADERS, 0, 1, REQUEST_BLOCK)
"""Headers that are to go on."""


BROKEN: dict[str, tuple[bytes, int]] = {
    "no preface": (b"GET / HTTP/1.1\r\n\r\n", PROTOCOL_ERROR),
    "a preface with a fault": (PREFACE[:-1] + b"x", PROTOCOL_ERROR),
    "a ping first": (PREFACE + frame(PING, 0, 0, bytes(8)), PROTOCOL_ERROR),
    "an answer to settings first": (PREFACE + frame(SETTINGS, ACK, 0), PROTOCOL_ERROR),
    "a frame that is too large": (START + b"\x01\0\x01\x10\0\0\0\0\0", FRAME_SIZE_ERROR),
    "settings of a stream": (START + frame(SETTINGS, 0, 1), PROTOCOL_ERROR),
    "settings of 5 bytes": (START + frame(SETTINGS, 0, 0, bytes(5)), FRAME_SIZE_ERROR),
    "settings of 7 bytes": (START + frame(SETTINGS, 0, 0, bytes(7)), FRAME_SIZE_ERROR),
    "an answer to settings that is not empty": (START + frame(SETTINGS, ACK, 0, bytes(6)), FRAME_SIZE_ERROR),
    "an initial window of 2^31": (START + settings((INITIAL_WINDOW, 2**31)), FLOW_CONTROL_ERROR),
    "frames of 16383 bytes": (START + settings((MAX_FRAME, 16383)), PROTOCOL_ERROR),
    "frames of 2^24 bytes": (START + settings((MAX_FRAME, 2**24)), PROTOCOL_ERROR),
    "pushes enabled by 2": (START + settings((ENABLE_PUSH, 2)), PROTOCOL_ERROR),
    "a window over 2^31 by settings": (
        OPEN + window(1, 2**31 - 1 - 65535) + settings((INITIAL_WINDOW, 65536)),
        FLOW_CONTROL_ERROR,
    ),
    "a ping of a stream": (START + frame(PING, 0, 1, bytes(8)), PROTOCOL_ERROR),
    "a ping of 7 bytes": (START + frame(PING, 0, 0, bytes(7)), FRAME_SIZE_ERROR),
    "a ping of 9 bytes": (START + frame(PING, ACK, 0, bytes(9)), FRAME_SIZE_ERROR),
    "a goaway of a stream": (OPEN + frame(GOAWAY, 0, 1, bytes(8)), PROTOCOL_ERROR),
    "a goaway of 7 bytes": (START + frame(GOAWAY, 0, 0, bytes(7)), FRAME_SIZE_ERROR),
    "a priority of no stream": (START + frame(PRIORITY, 0, 0, bytes(5)), PROTOCOL_ERROR),
    "a priority of 4 bytes": (START + frame(PRIORITY, 0, 1, bytes(4)), FRAME_SIZE_ERROR),
    "a priority of 6 bytes": (START + frame(PRIORITY, 0, 1, bytes(6)), FRAME_SIZE_ERROR),
    "a reset of no stream": (OPEN + reset(0), PROTOCOL_ERROR),
    "a reset of an idle stream": (OPEN + reset(3), PROTOCOL_ERROR),
    "a reset of a stream that is ours": (START + request(3) + reset(2), PROTOCOL_ERROR),
    "a reset of 3 bytes": (OPEN + frame(RST_STREAM, 0, 1, bytes(3)), FRAME_SIZE_ERROR),
    "a reset of 5 bytes": (OPEN + frame(RST_STREAM, 0, 1, bytes(5)), FRAME_SIZE_ERROR),
    "a window of 3 bytes": (OPEN + frame(WINDOW_UPDATE, 0, 1, bytes(3)), FRAME_SIZE_ERROR),
    "a window of 5 bytes": (START + frame(WINDOW_UPDATE, 0, 0, bytes(5)), FRAME_SIZE_ERROR),
    "a window of the connection that grows by 0": (START + window(0, 0), PROTOCOL_ERROR),
    "a window of the connection over 2^31": (START + window(0, 2**31 - 1), FLOW_CONTROL_ERROR),
    "a window of an idle stream": (OPEN + window(3, 1), PROTOCOL_ERROR),
    "a window of a stream that is ours": (START + request(3) + window(2, 1), PROTOCOL_ERROR),
    "data of no stream": (OPEN + frame(DATA, 0, 0, b"x"), PROTOCOL_ERROR),
    "data of an idle stream": (OPEN + frame(DATA, 0, 3, b"x"), PROTOCOL_ERROR),
    "data of a stream that is ours": (START + request(3) + frame(DATA, 0, 2, b"x"), PROTOCOL_ERROR),
    "data that is shorter than its padding": (OPEN + frame(DATA, PADDED, 1, b"\x03ab"), PROTOCOL_ERROR),
    "data without the length of its padding": (OPEN + frame(DATA, PADDED, 1), PROTOCOL_ERROR),
    "headers of no stream": (START + request(0), PROTOCOL_ERROR),
    "headers of a stream that is ours": (START + request(2), PROTOCOL_ERROR),
    "headers that are shorter than their padding": (
        START + frame(HEADERS, END_HEADERS | PADDED, 1, b"\xff" + REQUEST_BLOCK),
        PROTOCOL_ERROR,
    ),
    "headers that are shorter than their priority": (
        START + frame(HEADERS, END_HEADERS | WITH_PRIORITY, 1, bytes(4)),
        FRAME_SIZE_ERROR,
    ),
    "headers that refer to nothing": (START + frame(HEADERS, END_HEADERS, 1, b"\xbe"), COMPRESSION_ERROR),
    "headers that end in the midst of one": (
        START + frame(HEADERS, END_HEADERS, 1, REQUEST_BLOCK[:-1]),
        COMPRESSION_ERROR,
    ),
    "trailers that refer to nothing": (
        OPEN + frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\xbe"),
        COMPRESSION_ERROR,
    ),
    "headers of a closed stream that refer to nothing": (
        OPEN + reset(1) + frame(HEADERS, END_HEADERS, 1, b"\xbe"),
        COMPRESSION_ERROR,
    ),
    "a continuation of nothing": (OPEN + frame(CONTINUATION, END_HEADERS, 1), PROTOCOL_ERROR),
    "a continuation of an end": (OPEN + frame(CONTINUATION, END_HEADERS, 1, b"\x82"), PROTOCOL_ERROR),
    "a continuation of another stream": (START + BEGUN + frame(CONTINUATION, END_HEADERS, 3), PROTOCOL_ERROR),
    "headers within headers": (START + BEGUN + request(1), PROTOCOL_ERROR),
    "too many continuations": (
        START + BEGUN + frame(CONTINUATION, 0, 1) * (MAX_CONTINUATIONS + 1),
        ENHANCE_YOUR_CALM,
    ),
    "headers without an end": (
        START + BEGUN + frame(CONTINUATION, 0, 1, bytes(MAX_FRAME_BYTES)) * 33,
        ENHANCE_YOUR_CALM,
    ),
    "a promise": (START + frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4)), PROTOCOL_ERROR),
    **{
        f"a frame of kind {kind} within headers": (START + BEGUN + frame(kind, 0, stream, bytes(8)), PROTOCOL_ERROR)
        for kind in (DATA, PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, 99)
        for stream in (0, 1)
    },
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_frame_ends_the_connection_with_its_error(name: str) -> None:
    data, code = BROKEN[name]
    whole = outcome([data])
    assert whole.error == code
    assert outcome(in_pieces(data, [1] if len(data) < 10_000 else [1009])) == whole


def test_after_the_end_nothing_more_is_read() -> None:
    server = started()
    with pytest.raises(ProtocolBroken):
        server.take(request(1), frame(PING, 0, 1, bytes(8)), request(3))
    assert server.engine.failed
    server.engine.output()
    assert server.take(request(5)) == []
    assert server.events == [("begun", 1, False)]


def test_a_frame_that_is_too_large_is_refused_before_it_comes() -> None:
    server = started()
    assert server.take(b"\x01\0\0\x10\0\0\0\0\0") == []
    server = started()
    with pytest.raises(ProtocolBroken) as error:
        server.take(b"\x01\0\x01\x10\0\0\0\0\0")
    assert error.value.code == FRAME_SIZE_ERROR


END = frame(DATA, END_STREAM, 1, b"end")
FAULTS: dict[str, tuple[bytes, int, bool]] = {
    "data behind the end": (OPEN + END + frame(DATA, 0, 1, b"x"), STREAM_CLOSED, True),
    "a second end": (OPEN + END + END, STREAM_CLOSED, True),
    "headers behind the end": (OPEN + END + request(1), STREAM_CLOSED, True),
    "headers that are no trailers": (OPEN + request(1), PROTOCOL_ERROR, True),
    "a window that grows by 0": (OPEN + window(1, 0), PROTOCOL_ERROR, True),
    "a window over 2^31": (OPEN + window(1, 2**31 - 1), FLOW_CONTROL_ERROR, True),
    "more data than the window": (OPEN + frame(DATA, 0, 1, bytes(65536)) * 5, FLOW_CONTROL_ERROR, True),
    "headers without a method": (START + frame(HEADERS, END_HEADERS, 1, encode(REQUEST[1:])), PROTOCOL_ERROR, False),
    "no headers": (START + frame(HEADERS, END_HEADERS, 1), PROTOCOL_ERROR, False),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_one_stream_ends_that_one(name: str) -> None:
    data, code, is_told = FAULTS[name]
    server = Server(consumes=False)
    sent = server.take(data)
    assert [(it.stream, it.error) for it in sent if it.kind == RST_STREAM] == [(1, code)]
    assert server.resets == ({1: code} if is_told else {})
    assert not server.engine._streams
    late = [frame(DATA, END_STREAM, 1, b"late"), window(1, 5), request(1, END_HEADERS | END_STREAM), reset(1)]
    assert server.take(*late) == []
    server.take(request(3), frame(DATA, END_STREAM, 3, b"sound"))
    assert server.bodies[3] == b"sound"
    assert server.ended_streams[-1] == 3


def test_a_stream_may_use_all_of_its_window() -> None:
    server = started(consumes=False)
    assert server.take(request(1), frame(DATA, 0, 1, bytes(65536)) * (STREAM_WINDOW // 65536)) == []
    assert [it.error for it in server.take(frame(DATA, 0, 1, b"x"))] == [FLOW_CONTROL_ERROR]


def without(name: bytes) -> list[Header]:
    return [header for header in REQUEST if header[0] != name]


@pytest.mark.parametrize(
    "headers",
    [
        without(b":method"),
        without(b":path"),
        without(b":scheme"),
        [*REQUEST, (b":method", b"POST")],
        [(b":method", b"POST"), *REQUEST],
        [(b"x", b"1"), *REQUEST],
        [(b":status", b"200"), *REQUEST],
        [(b":protocol", b"websocket"), *REQUEST],
        [(b":", b""), *REQUEST],
        [*REQUEST, (b"", b"1")],
        [*REQUEST, (b"Upper", b"1")],
        [*REQUEST, (b"with space", b"1")],
        [*REQUEST, (b"with:colon", b"1")],
        [*REQUEST, (b"with\nline", b"1")],
        [*REQUEST, (b"\xc3\xa4", b"1")],
        [*REQUEST, (b"\x7f", b"1")],
        [*REQUEST, (b"line", b"1\n2")],
        [*REQUEST, (b"line", b"1\r2")],
        [*REQUEST, (b"zero", b"\0")],
        [(b":path", b"/a\r\nb"), *without(b":path")],
        [*REQUEST, (b"connection", b"close")],
        [*REQUEST, (b"keep-alive", b"1")],
        [*REQUEST, (b"proxy-connection", b"1")],
        [*REQUEST, (b"transfer-encoding", b"chunked")],
        [*REQUEST, (b"upgrade", b"h2c")],
        [*without(b"te"), (b"te", b"gzip")],
    ],
)
def test_a_malformed_request_is_none(headers: list[Header]) -> None:
    server = started()
    sent = server.take(frame(HEADERS, END_HEADERS, 1, encode(headers)), request(3))
    assert [(it.kind, it.stream, it.error) for it in sent] == [(RST_STREAM, 1, PROTOCOL_ERROR)]
    assert server.events == [("begun", 3, False)]


# Any bytes ------------------------------------------------------------------------------------

STREAMS = st.sampled_from([0, 1, 2, 3, 5, 7, 2**31 - 1, 2**31 + 1])
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)
ANY_FRAMES = st.builds(
    frame,
    st.integers(0, 11),
    st.sampled_from([0, 1, 4, 5, 8, 9, 12, 13, 32, 36, 37, 45, 255]),
    STREAMS,
    st.binary(max_size=12) | st.sampled_from([REQUEST_BLOCK, b"\x04" + REQUEST_BLOCK, bytes(4), bytes(8), b"\0\0\0\1"]),
)
SOUND_FRAMES = st.one_of(
    st.builds(request, st.sampled_from([1, 3, 5, 7, 9]), st.sampled_from([4, 5])),
    st.builds(lambda number, ends, data: frame(DATA, ends, number, data), STREAMS, st.integers(0, 1), st.binary()),
    st.builds(window, STREAMS, st.integers(0, 2**31 - 1)),
    st.builds(reset, STREAMS),
    st.builds(lambda name, value: settings((name, value)), st.integers(0, 7), st.integers(0, 2**17)),
    st.just(frame(PING, 0, 0, b"12345678")),
    st.just(frame(HEADERS, 0, 1, REQUEST_BLOCK[:20]) + frame(CONTINUATION, END_HEADERS, 1, REQUEST_BLOCK[20:])),
)


@given(st.binary(max_size=200), st.sampled_from([b"", PREFACE, START, OPEN]), SIZES)
def test_any_bytes_are_frames_or_broken_wherever_they_are_cut(data: bytes, before: bytes, sizes: list[int]) -> None:
    assert outcome(in_pieces(before + data, sizes)) == outcome([before + data])


@options(deadline=None, max_examples=300)
@given(st.lists(ANY_FRAMES | SOUND_FRAMES, max_size=15), SIZES)
def test_any_frames_in_any_order_are_taken_or_broken(parts: list[bytes], sizes: list[int]) -> None:
    data = START + b"".join(parts)
    assert outcome(in_pieces(data, sizes)) == outcome([data])


@options(deadline=None, max_examples=300)
@given(
    st.lists(SOUND_FRAMES, min_size=1, max_size=15),
    st.lists(st.tuples(st.integers(0), st.integers(0, 255), st.sampled_from("rid")), min_size=1, max_size=4),
    SIZES,
)
def test_frames_with_bytes_replaced_inserted_or_dropped_are_taken_or_broken(
    parts: list[bytes], changes: list[tuple[int, int, str]], sizes: list[int]
) -> None:
    data = bytearray(START + b"".join(parts))
    for place, byte, change in changes:
        place = len(PREFACE) + place % (len(data) - len(PREFACE))
        data[place : place + (change != "i")] = b"" if change == "d" else bytes((byte,))
    assert outcome(in_pieces(bytes(data), sizes)) == outcome([bytes(data)])


# Floods ---------------------------------------------------------------------------------------


def state_of(engine: Engine) -> int:
    """How many things an engine keeps."""
    kept = (engine._streams, engine._working, engine._blocked, engine._block, engine._rest, engine._decoder._cache)
    return sum(map(len, kept))


FLOODS: dict[str, bytes] = {
    "pings": frame(PING, 0, 0, bytes(8)),
    "answers to pings": frame(PING, ACK, 0, bytes(8)),
    "settings": settings((INITIAL_WINDOW, 70_000)),
    "empty settings": settings(),
    "answers to settings": frame(SETTINGS, ACK, 0),
    "empty data": frame(DATA, 0, 1),
    "data of padding only": frame(DATA, PADDED, 1, b"\x02\0\0"),
    "data of a closed stream": frame(DATA, 0, 3, b"x"),
    "windows of the connection": window(0, 1),
    "windows of a stream": window(1, 1),
    "windows of a closed stream": window(3, 1),
    "windows where nothing can be sent": window(5, 1),
    "priorities": frame(PRIORITY, 0, 1, bytes(5)),
    "priorities of idle streams": frame(PRIORITY, 0, 99, bytes(5)),
    "resets of a closed stream": reset(3),
    "headers of a closed stream": request(3),
    "farewells": frame(GOAWAY, 0, 0, bytes(8)),
    "unknown frames": frame(99, 0, 0, b"unknown"),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_ends_the_connection(name: str) -> None:
    server = started()
    server.take(request(1), request(3), reset(3), request(5, END_HEADERS | END_STREAM))
    if "nothing can be sent" in name:  # as the window of the stream is below 0
        server.engine.send_data(server.streams[5], bytes(60_000))
        server.take(settings((INITIAL_WINDOW, 0)))
        server.engine.send_data(server.streams[5], bytes(10))
    before = state_of(server.engine)
    for _ in range(MAX_IDLE_FRAMES - 10):
        server.engine.receive(FLOODS[name])
        assert len(server.engine.output()) <= 17
    with pytest.raises(ProtocolBroken) as error:
        server.engine.receive(FLOODS[name] * 20)
    assert error.value.code == ENHANCE_YOUR_CALM
    server.engine._rest = b""  # what the end left unread
    assert state_of(server.engine) == before


def test_calls_and_data_between_them_are_no_flood() -> None:
    server = started()
    server.take(request(1))
    useful = [functools.partial(frame, DATA, 0, 1, b"x"), functools.partial(request, 3)]
    for step in useful:
        server.take(frame(PING, 0, 0, bytes(8)) * (MAX_IDLE_FRAMES - 10))
        server.take(step())
    server.take(frame(PING, 0, 0, bytes(8)) * (MAX_IDLE_FRAMES - 10))


def test_a_client_that_reads_a_long_answer_is_no_flood() -> None:
    server = started()
    server.take(request(1, END_HEADERS | END_STREAM))
    for _ in range(2 * MAX_IDLE_FRAMES):
        server.engine.send_data(server.streams[1], bytes(1000))
        server.engine.output()
        server.take(window(0, 1000), window(1, 1000))


def test_streams_that_are_reset_by_thousands_leave_nothing() -> None:
    server = started()
    server.take(request(1))
    before = state_of(server.engine)
    for number in range(3, 40_003, 2):
        server.engine.receive(request(number) + reset(number))
        if number in server.streams:
            server.engine.release(server.streams.pop(number))
        assert len(server.engine.output()) <= 13
    assert state_of(server.engine) == before


def test_thousands_of_settings_in_a_frame_touch_each_stream_once() -> None:
    server = started()
    server.take(*(request(number) for number in range(1, 256, 2)))
    pairs = [(INITIAL_WINDOW, number % 2 * 1000) for number in range(10_000)]
    assert len(server.take(settings(*pairs) * 20)) == 20
    assert {stream.send_window for stream in server.streams.values()} == {1000}
