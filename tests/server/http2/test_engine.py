"""The engine beside a whole client, the package h2's, which raises at what breaks the protocol."""

from __future__ import annotations

import h2.events
import h2.exceptions
import h2.settings
import hpack
import pytest
from h2.stream import StreamState
from hypothesis import given
from hypothesis import settings as options
from hypothesis import strategies as st

from server.http2.engine import (
    CANCEL,
    EVERY_STREAM,
    MAX_IDLE_FRAMES,
    NO_ERROR,
    PROTOCOL_ERROR,
    REFUSED_STREAM,
    STREAM_WINDOW,
    Stream,
)
from server.http2.head import Head
from tests.server.http2.peer import (
    ACK,
    ANSWER_BLOCK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW,
    PADDED,
    PING,
    PRIORITY,
    REQUEST,
    REQUEST_BLOCK,
    RST_STREAM,
    SETTINGS,
    START,
    TRAILERS,
    TRAILERS_BLOCK,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    Pair,
    Server,
    frame,
    frames,
    request,
    reset,
    settings,
    started,
    window,
)


def text(size: int) -> bytes:
    """Bytes of which no piece is as another one."""
    return bytes(bytearray().join(number.to_bytes(4) for number in range(size // 4 + 1))[:size])


# Calls --------------------------------------------------------------------------------


def test_a_call_goes_there_and_back() -> None:
    pair = Pair()
    number = pair.open()
    pair.send(number, b"question")
    pair.exchange()
    server = pair.server
    assert server.events == [("begun", 1, False), ("received", 1, b"question"), ("ended", 1)]
    assert server.heads[1].path == b"/a/B"
    server.answer(server.streams[1], b"answer")
    pair.exchange()
    assert pair.bodies[1] == b"answer"
    assert pair.ends == {1: TRAILERS}
    assert [type(event) for event in pair.events if isinstance(event, h2.events.StreamEnded)]
    assert not pair.engine._streams


@pytest.mark.parametrize("pieces", [[1], [7], [9, 1, 24], [65536]])
def test_many_streams_interleave(pieces: list[int]) -> None:
    pair = Pair(pieces=pieces)
    numbers = [pair.open() for _ in range(100)]
    for part in (b"one", b"two"):
        for number in numbers:
            pair.send(number, part + b"%d" % number, ends=part == b"two")
    pair.exchange()
    assert pair.server.ended_streams == numbers
    for number in reversed(numbers):
        stream = pair.server.streams[number]
        assert pair.server.bodies[number] == b"one%dtwo%d" % (number, number)
        pair.server.answer(stream, b"to ", b"%d" % number)
    pair.exchange()
    assert pair.bodies == {number: b"to %d" % number for number in numbers}
    assert pair.ends == dict.fromkeys(numbers, TRAILERS)


def test_a_request_of_headers_only_has_ended_when_it_begins() -> None:
    pair = Pair()
    pair.open(ends=True)
    pair.exchange()
    assert pair.server.events == [("begun", 1, True)]
    pair.engine.send_headers(pair.server.streams[1], ANSWER_BLOCK, ends=True)
    pair.exchange()
    assert isinstance(pair.events[-1], h2.events.StreamEnded)


def test_trailers_of_the_client_end_its_side() -> None:
    pair = Pair()
    number = pair.open()
    pair.send(number, b"question", ends=False)
    pair.client.send_headers(number, [(b"some", b"trailer")], end_stream=True)
    pair.exchange()
    assert pair.server.events[1:] == [("received", 1, b"question"), ("ended", 1)]
    pair.server.answer(pair.server.streams[1], b"answer")
    pair.exchange()
    assert pair.ends == {1: TRAILERS}


def test_headers_may_be_cut_into_continuations_and_priorities_mean_nothing() -> None:
    pair = Pair()
    large = [(b"x-%d" % number, b"v" * 5000) for number in range(8)]
    pair.client.send_headers(1, [*REQUEST, *large], end_stream=True)
    pair.client.send_headers(3, REQUEST, priority_weight=3, priority_depends_on=5, priority_exclusive=True)
    pair.client.prioritize(7, weight=9)
    pair.exchange()
    assert list(pair.server.heads[1].headers) == [*REQUEST, *large]
    assert pair.server.events == [("begun", 1, True), ("begun", 3, False)]


def test_padding_is_left_out_and_gives_its_window_back() -> None:
    pair = Pair()
    number = pair.open()
    body = text(2_000_000)
    pair.send(number, body, pad=255)
    pair.exchange()
    assert pair.server.bodies[number] == body


def test_frames_of_nothing_but_padding_do_not_stop_a_stream() -> None:
    pair = Pair(Server(consumes=False))
    number = pair.open()
    for _ in range(3 * STREAM_WINDOW // 256):
        pair.client.send_data(number, b"", pad_length=255)
        pair.exchange()
    assert pair.server.streams[number].receive_window > STREAM_WINDOW // 2


@pytest.mark.parametrize(
    ("flags", "payload"),
    [
        (END_HEADERS, REQUEST_BLOCK),
        (END_HEADERS | PADDED, b"\x03" + REQUEST_BLOCK + bytes(3)),
        (END_HEADERS | PADDED, b"\0" + REQUEST_BLOCK),
        (END_HEADERS | WITH_PRIORITY, b"\0\0\0\x01\x10" + REQUEST_BLOCK),
        (END_HEADERS | PADDED | WITH_PRIORITY, b"\x09" + b"\x80\0\0\x01\x10" + REQUEST_BLOCK + bytes(9)),
    ],
)
def test_headers_may_be_padded_and_have_a_priority(flags: int, payload: bytes) -> None:
    server = started()
    server.take(frame(HEADERS, flags, 1, payload))
    assert list(server.heads[1].headers) == REQUEST


@pytest.mark.parametrize("flags", [0, PADDED])
@pytest.mark.parametrize("cuts", [1, 2, 100])
def test_a_block_may_be_cut_anywhere(flags: int, cuts: int) -> None:
    server = started()
    parts = [REQUEST_BLOCK[start : start + cuts] for start in range(0, len(REQUEST_BLOCK), cuts)]
    first = b"\x02" + parts[0] + bytes(2) if flags else parts[0]
    server.take(frame(HEADERS, flags | END_STREAM, 1, first))
    for part in parts[1:]:
        server.take(frame(CONTINUATION, 0, 1, part))
    assert server.events == []
    server.take(frame(CONTINUATION, END_HEADERS, 1))
    assert server.events == [("begun", 1, True)]
    assert list(server.heads[1].headers) == REQUEST


# Windows --------------------------------------------------------------------------------


@options(deadline=None, max_examples=40)
@given(
    size=st.integers(0, 600_000),
    answers=st.lists(st.integers(1, 200_000), max_size=5),
    client_window=st.integers(1, 2**31 - 1) | st.integers(1000, 100_000),
    frame_size=st.integers(16384, 2**24 - 1),
    pieces=st.lists(st.integers(1, 100_000) | st.just(65536), min_size=1, max_size=4),
    pad=st.none() | st.integers(0, 255),
)
def test_what_is_sent_arrives_whole_and_in_order(
    size: int, answers: list[int], client_window: int, frame_size: int, pieces: list[int], pad: int | None
) -> None:
    client_window = max(client_window, sum(answers) // 300)  # so many turns at most
    pieces = [max(piece, size // 2000) for piece in pieces]
    pair = Pair(window=client_window, frame_size=frame_size, pieces=pieces)
    number = pair.open()
    pair.send(number, text(size), pad=pad)
    pair.exchange()
    stream = pair.server.streams[number]
    assert pair.server.bodies[number] == text(size)
    assert pair.server.ended_streams == [number]
    whole = text(sum(answers))
    messages, position = [], 0
    for length in answers:
        messages.append(whole[position : position + length])
        position += length
    pair.server.answer(stream, *messages)
    pair.exchange()
    assert pair.bodies.get(number, b"") == whole
    assert pair.ends == {number: TRAILERS}
    assert not pair.engine.has_unsent
    assert not pair.engine._streams


@options(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 60_000), min_size=1, max_size=4),
    steps=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 50_000)), max_size=30),
    first=st.integers(0, 70_000),
)
def test_answers_arrive_whole_whatever_windows_the_client_gives_and_takes(
    sizes: list[int], steps: list[tuple[int, int]], first: int
) -> None:
    pair = Pair(window=first)
    pair.reads = False
    numbers = [pair.open(ends=True) for _ in sizes]
    pair.exchange()
    for number, size in zip(numbers, sizes, strict=True):
        pair.server.answer(pair.server.streams[number], text(size)[: size // 2], text(size)[size // 2 :])
    for place, amount in steps:
        pair.exchange()
        if place == 0:
            pair.client.increment_flow_control_window(amount)
        elif place == 1:  # also to less, so that the windows of streams are below 0
            pair.client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: amount})
        elif (number := numbers[place % len(numbers)]) not in pair.ends:
            pair.client.increment_flow_control_window(amount, number)
    pair.exchange()
    for number, size in zip(numbers, sizes, strict=True):
        assert text(size).startswith(pair.bodies.get(number, b""))
        assert (number in pair.ends) == (len(pair.bodies.get(number, b"")) == size)
    for number in numbers:
        if number not in pair.ends:
            pair.client.increment_flow_control_window(200_000, number)
    pair.client.increment_flow_control_window(1_000_000)
    pair.exchange()
    assert pair.ends == dict.fromkeys(numbers, TRAILERS)
    assert pair.bodies == {number: text(size) for number, size in zip(numbers, sizes, strict=True)}


def test_trailers_go_behind_data_that_waits() -> None:
    pair = Pair(window=0)
    pair.reads = False
    number = pair.open(ends=True)
    pair.exchange()
    stream = pair.server.streams[number]
    pair.server.answer(stream, b"ab", b"cd")
    pair.exchange()
    assert (len(pair.bodies), pair.ends, stream.pending_bytes) == (0, {}, 4)
    assert pair.engine.has_unsent
    for expected in (b"a", b"ab", b"abc"):
        pair.client.increment_flow_control_window(1, number)
        pair.exchange()
        assert bytes(pair.bodies[number]) == expected
        assert pair.ends == {}
    pair.client.increment_flow_control_window(1, number)
    pair.exchange()
    assert pair.ends == {number: TRAILERS}


def test_nothing_is_sent_behind_the_end() -> None:
    server = started()
    server.take(settings((INITIAL_WINDOW, 1)), request(1, END_HEADERS | END_STREAM))
    stream = server.streams[1]
    server.answer(stream, b"ab")
    server.engine.send_data(stream, b"late")
    server.engine.send_headers(stream, TRAILERS_BLOCK, ends=True)
    list(frames(server.engine.output()))
    assert [(it.kind, it.content) for it in server.take(window(1, 100))] == [(DATA, b"b"), (HEADERS, TRAILERS_BLOCK)]
    server.engine.send_data(stream, b"later")
    server.engine.send_headers(stream, TRAILERS_BLOCK, ends=True)
    server.engine.reset(stream, CANCEL)
    assert server.engine.output() == b""


def test_nothing_is_no_data_even_without_a_window() -> None:
    server = started()
    server.take(settings((INITIAL_WINDOW, 10)), request(1, END_HEADERS | END_STREAM))
    server.engine.send_data(server.streams[1], bytes(10))
    server.take(settings((INITIAL_WINDOW, 0)))
    server.engine.send_data(server.streams[1], b"")
    server.engine.send_headers(server.streams[1], TRAILERS_BLOCK, ends=True)
    assert [it.kind for it in frames(server.engine.output())] == [HEADERS]
    assert not server.engine.has_unsent
    assert server.take(window(0, 100)) == []


def test_a_window_below_zero_has_to_be_filled_first() -> None:
    server = started()
    server.take(request(1, END_HEADERS | END_STREAM))
    server.engine.send_data(server.streams[1], bytes(1000))
    server.engine.output()
    server.take(settings((INITIAL_WINDOW, 300)))
    assert server.streams[1].send_window == -700
    server.engine.send_data(server.streams[1], b"abc")
    assert server.engine.output() == b""
    assert server.take(window(1, 700)) == []
    assert [it.content for it in server.take(window(1, 2))] == [b"ab"]
    assert [it.content for it in server.take(settings((INITIAL_WINDOW, 301)))] == [b"", b"c"]


def test_all_settings_of_a_frame_count_and_the_last_of_each_name() -> None:
    server = started()
    server.take(request(1))
    server.take(settings((INITIAL_WINDOW, 5), (INITIAL_WINDOW, 2**31 - 1), (99, 1), (INITIAL_WINDOW, 7)))
    assert server.streams[1].send_window == 7
    server.take(request(3))
    assert server.streams[3].send_window == 7


def test_a_sink_that_does_not_consume_stops_the_client_and_one_that_does_lets_it_go_on() -> None:
    pair = Pair(Server(consumes=False))
    number = pair.open()
    pair.exchange()
    sent = 0
    while room := min(pair.client.local_flow_control_window(number), 16384):
        pair.client.send_data(number, bytes(room))
        pair.exchange()
        sent += room
    assert sent == STREAM_WINDOW == len(pair.server.bodies[number])
    stream = pair.server.streams[number]
    pair.engine.consume(stream, STREAM_WINDOW // 2 - 1)
    pair.exchange()
    assert pair.client.local_flow_control_window(number) == 0
    pair.engine.consume(stream, 1)
    pair.exchange()
    assert pair.client.local_flow_control_window(number) == STREAM_WINDOW // 2
    other = pair.open()
    pair.send(other, text(STREAM_WINDOW))
    pair.exchange()
    assert pair.server.bodies[other] == text(STREAM_WINDOW)


def test_no_more_window_is_given_back_than_was_used() -> None:
    pair = Pair(Server(consumes=False))
    number = pair.open()
    pair.send(number, bytes(1000), ends=False)
    pair.exchange()
    pair.engine.consume(pair.server.streams[number], 2**31)
    pair.exchange()
    assert pair.client.local_flow_control_window(number) == STREAM_WINDOW
    pair.engine.consume(pair.server.streams[number], 2**31)
    assert pair.engine.output() == b""


def test_the_window_of_the_connection_never_runs_out() -> None:
    server = started()
    server.take(request(1))
    chunk = frame(DATA, 0, 1, bytes(65536)) * 2
    given, taken = 2**31 - 1, 0
    for _ in range(8800):
        for it in server.take(chunk):
            if it.stream == 0:
                assert it.kind == WINDOW_UPDATE
                given += int.from_bytes(it.content)
        server.bodies[1].clear()
        server.events.clear()
        taken += 2 * 65536
    assert 2**30 - 2**20 <= given - taken <= 2**31 - 1


def test_a_client_that_takes_nothing_stops_the_server_with_few_answers_kept() -> None:
    server = started()
    server.take(settings((INITIAL_WINDOW, 0)))
    refused = 0
    for number in range(1, 2001, 2):
        sent = server.take(request(number, END_HEADERS | END_STREAM))
        refused += [it.error for it in sent if it.kind == RST_STREAM] == [REFUSED_STREAM]
        if number in server.streams:
            server.answer(server.streams[number], bytes(10_000))
    assert (len(server.streams), refused) == (128, 1000 - 128)
    assert sum(stream.pending_bytes for stream in server.streams.values()) == 128 * 10_000
    server.take(window(0, 2**30), settings((INITIAL_WINDOW, 10_000)))
    assert not server.engine.has_unsent
    server.take(request(2001))
    assert 2001 in server.streams


# Ends ------------------------------------------------------------------------------------


def test_an_answer_before_the_end_of_the_request_has_the_client_send_no_more() -> None:
    pair = Pair()
    number = pair.open()
    pair.send(number, b"some", ends=False)
    pair.exchange()
    pair.server.answer(pair.server.streams[number], b"enough")
    pair.exchange()
    assert pair.ends == {number: TRAILERS}
    assert pair.events[-1].error_code == NO_ERROR  # type: ignore[attr-defined]
    assert pair.server.take(frame(DATA, END_STREAM, number, b"late")) == []
    assert not pair.server.ended_streams


def test_a_stream_that_lingers_takes_what_still_comes() -> None:
    pair = Pair()
    number = pair.open()
    pair.send(number, b"some", ends=False)
    pair.exchange()
    stream = pair.server.streams[number]
    pair.engine.send_headers(stream, ANSWER_BLOCK)
    pair.engine.end(stream, lingers=True)
    pair.exchange()
    assert number not in pair.ends
    pair.send(number, text(STREAM_WINDOW))
    pair.exchange()
    assert pair.server.bodies[number] == b"some" + text(STREAM_WINDOW)
    assert pair.server.ended_streams == [number]
    assert not pair.engine._streams


def test_what_waits_for_the_window_can_be_dropped_for_another_end() -> None:
    pair = Pair(window=10)
    number = pair.open(ends=True)
    pair.exchange()
    stream = pair.server.streams[number]
    pair.reads = False
    pair.server.answer(stream, bytes(100))
    pair.exchange()
    assert pair.engine.has_unsent
    pair.engine.drop_unsent(stream)
    pair.engine.send_headers(stream, TRAILERS_BLOCK, ends=True)
    pair.exchange()
    assert not pair.engine.has_unsent
    assert stream.closed_here


def test_frames_that_bring_nothing_forward_may_be_counted_anew() -> None:
    server = started()
    for _ in range(3):
        server.take(frame(PING, 0, 0, bytes(8)) * (MAX_IDLE_FRAMES - 10))
        server.engine.forgive()


def test_a_sink_that_ends_a_stream_while_it_is_told_of_its_end_is_told_no_more() -> None:
    class Hasty(Server):
        def received(self, stream: Stream, data: bytes) -> None:
            super().received(stream, data)
            self.answer(stream, b"at once")

    server = Hasty()
    server.take(START, request(1), frame(DATA, END_STREAM, 1, b"x"), request(3))
    assert server.events == [("begun", 1, False), ("received", 1, b"x"), ("begun", 3, False)]


def test_a_sink_may_answer_or_reset_a_stream_as_it_begins() -> None:
    class Hasty(Server):
        def begun(self, stream: Stream, head: Head) -> None:
            super().begun(stream, head)
            if stream.id % 4 == 1:
                self.engine.reset(stream, CANCEL)
            else:
                self.answer(stream)

    server = Hasty()
    sent = server.take(START, *(request(number) + frame(DATA, END_STREAM, number, b"x") for number in (1, 3, 5)))
    assert [(it.stream, it.kind) for it in sent if it.stream] == [
        (1, RST_STREAM),
        (3, HEADERS),
        (3, HEADERS),
        (3, RST_STREAM),
        (5, RST_STREAM),
    ]
    assert not server.engine._streams
    assert [event[0] for event in server.events] == ["begun"] * 3


def test_a_reset_of_the_client_drops_what_waits_for_it() -> None:
    pair = Pair(window=10)
    pair.reads = False
    number = pair.open(ends=True)
    pair.exchange()
    pair.server.answer(pair.server.streams[number], bytes(100))
    pair.exchange()
    pair.client.reset_stream(number, CANCEL)
    pair.exchange()
    assert pair.server.resets == {number: CANCEL}
    assert not pair.engine.has_unsent
    assert pair.server.streams[number].pending_bytes == 0
    pair.engine.send_data(pair.server.streams[number], b"late")
    pair.engine.consume(pair.server.streams[number], STREAM_WINDOW)
    assert pair.engine.output() == b""


def test_a_reset_of_the_server_reaches_the_client() -> None:
    pair = Pair()
    number = pair.open()
    pair.send(number, b"some", ends=False)
    pair.exchange()
    pair.engine.reset(pair.server.streams[number], PROTOCOL_ERROR)
    pair.client.send_data(number, b"on its way", end_stream=True)
    pair.exchange()
    assert pair.ends == {number: PROTOCOL_ERROR}
    assert pair.server.bodies[number] == b"some"
    assert not pair.server.resets


def client_may_send(pair: Pair, number: int) -> bool:
    stream = pair.client.streams.get(number)
    return stream is not None and stream.state_machine.state in (StreamState.OPEN, StreamState.HALF_CLOSED_REMOTE)


def client_may_reset(pair: Pair, number: int) -> bool:
    stream = pair.client.streams.get(number)
    return stream is not None and stream.state_machine.state not in (StreamState.IDLE, StreamState.CLOSED)


ACTIONS = st.tuples(st.integers(0, 13), st.integers(0, 5), st.integers(0, 80_000))


@options(deadline=None, max_examples=300)
@given(st.lists(ACTIONS, max_size=60), st.sampled_from([0, 10, 65535]), st.lists(st.integers(100, 3000), min_size=1))
def test_no_order_of_what_both_sides_do_breaks_the_protocol(
    actions: list[tuple[int, int, int]], first: int, pieces: list[int]
) -> None:
    pair = Pair(Server(max_streams=4, consumes=False), window=first, pieces=pieces)
    pair.reads = False
    server, client, engine = pair.server, pair.client, pair.engine
    sent: dict[int, bytearray] = {}
    answered: dict[int, bytearray] = {}
    for _ in range(2):
        sent[pair.open()] = bytearray()
    pair.exchange()
    for action, place, size in actions:
        number = 2 * place + 1
        stream = server.streams.get(number)
        if action == 0 and client.open_outbound_streams < 4 and len(sent) < 30:
            sent[pair.open(ends=size % 3 == 0)] = bytearray()
        elif action == 1 and client_may_send(pair, number):
            data = text(max(0, min(size, client.local_flow_control_window(number), 16384)))
            client.send_data(number, data, end_stream=size % 3 == 0)
            sent[number] += data
        elif action == 2 and client_may_reset(pair, number):
            client.reset_stream(number, CANCEL)
        elif action == 3 and client_may_reset(pair, number):
            client.increment_flow_control_window(1 + size, number)
            client.increment_flow_control_window(1 + size // 2)
        elif action == 4:
            client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: size})
        elif action == 5 and client_may_send(pair, number):
            client.send_headers(number, [(b"some", b"trailer")], end_stream=True)
        elif action == 6:
            client.ping(bytes(8))
        elif action == 7:
            pair.exchange()
        if stream is None:
            continue
        if action == 8:
            engine.send_headers(stream, ANSWER_BLOCK) if number not in answered else None
            answered.setdefault(number, bytearray())
        elif action == 9 and number in answered:
            if not stream.closed_here and stream.end_block is None:
                answered[number] += text(size)
            engine.send_data(stream, text(size))
        elif action == 10 and number in answered:
            engine.send_headers(stream, TRAILERS_BLOCK, ends=True)
        elif action == 11:
            engine.reset(stream, CANCEL)
        elif action == 12:
            engine.release(stream)
        elif action == 13:
            engine.consume(stream, size)
        assert len(engine._streams) <= 4
        assert len(engine._working) <= 4
        assert engine._blocked.items() <= engine._streams.items()
        assert all(it.pending_bytes == sum(map(len, it.pending)) > 0 for it in engine._blocked.values())
    pair.exchange()
    for number, body in server.bodies.items():
        assert sent[number].startswith(body)
    for number, body in pair.bodies.items():
        assert answered[number].startswith(body)
        if pair.ends.get(number) == TRAILERS:
            assert answered[number] == body


# Bounds --------------------------------------------------------------------------------------


def test_128_streams_are_open_and_one_more_is_refused() -> None:
    server = started()
    assert server.take(*(request(number) for number in range(1, 256, 2))) == []
    assert [(it.kind, it.stream, it.error) for it in server.take(request(257))] == [(RST_STREAM, 257, REFUSED_STREAM)]
    assert server.take(frame(DATA, END_STREAM, 257, b"late"), window(257, 5), reset(257)) == []
    server.take(frame(DATA, END_STREAM, 1))
    server.answer(server.streams[1])
    server.engine.output()
    assert server.take(request(259)) == []
    assert [it.error for it in server.take(request(261))] == [REFUSED_STREAM]
    assert len(server.streams) == 129


def test_the_client_of_h2_keeps_to_the_number_of_streams() -> None:
    pair = Pair(Server(max_streams=3))
    for _ in range(3):
        pair.open()
    with pytest.raises(h2.exceptions.TooManyStreamsError):
        pair.open()


def test_streams_that_are_opened_and_reset_at_once_count_until_they_are_released() -> None:
    server = started()
    for number in range(1, 4001, 2):
        server.take(request(number), reset(number))
    assert len(server.streams) == len(server.resets) == 128
    assert not server.engine._streams
    for number in (1, 3):
        server.engine.release(server.streams[number])
    server.take(*(request(number) + reset(number) for number in range(4001, 4011, 2)))
    assert list(server.streams)[128:] == [4001, 4003]


def test_a_stream_may_be_released_before_it_is_at_its_end_and_twice() -> None:
    server = started(max_streams=1)
    server.take(request(1))
    server.engine.release(server.streams[1])
    assert [it.error for it in server.take(request(3))] == [REFUSED_STREAM]
    server.take(reset(1))
    server.engine.release(server.streams[1])
    assert server.take(request(5)) == []


# Connection ---------------------------------------------------------------------------------


def test_a_ping_is_answered_and_ours_is_too() -> None:
    pair = Pair()
    pair.client.ping(b"12345678")
    pair.engine.ping()
    pair.exchange()
    assert ("pinged", False) in pair.server.events
    assert ("pinged", True) in pair.server.events
    acks = [event.ping_data for event in pair.events if isinstance(event, h2.events.PingAckReceived)]
    assert acks == [b"12345678"]


def test_the_end_is_told_in_two_steps_and_streams_after_it_are_refused() -> None:
    server = started()
    server.take(request(1))
    server.engine.goaway(EVERY_STREAM)
    assert server.take(request(3)) == [(GOAWAY, 0, 0, b"\x7f\xff\xff\xff\0\0\0\0")]
    server.engine.goaway(server.engine.last_stream)
    sent = server.take(request(5), request(7))
    assert sent[0] == (GOAWAY, 0, 0, b"\0\0\0\x03\0\0\0\0")
    assert [(it.kind, it.stream, it.error) for it in sent[1:]] == [
        (RST_STREAM, 5, REFUSED_STREAM),
        (RST_STREAM, 7, REFUSED_STREAM),
    ]
    server.take(frame(DATA, END_STREAM, 1, b"still"))
    server.answer(server.streams[1], b"answered")
    assert [it.kind for it in frames(server.engine.output())] == [HEADERS, DATA, HEADERS]


def test_the_last_stream_of_a_goaway_never_grows() -> None:
    server = started()
    server.take(request(1))
    server.engine.goaway(1)
    server.engine.output()
    server.take(request(3))
    server.engine.goaway(server.engine.last_stream, PROTOCOL_ERROR)
    assert [it.content[:4] for it in frames(server.engine.output())] == [b"\0\0\0\x01"]


def test_headers_of_refused_streams_are_read_as_later_ones_refer_to_them() -> None:
    server, encoder = started(max_streams=1), hpack.Encoder()
    for number in (1, 3, 5):
        sent = server.take(frame(HEADERS, END_HEADERS, number, encoder.encode([*REQUEST, (b"x", b"%d" % number)])))
        assert [it.error for it in sent] == ([] if number == 1 else [REFUSED_STREAM])
    server.take(reset(1))
    server.engine.release(server.streams[1])
    server.take(frame(HEADERS, END_HEADERS, 7, encoder.encode([*REQUEST, (b"x", b"5")])))
    assert list(server.heads[7].headers) == [*REQUEST, (b"x", b"5")]


def test_a_goaway_and_priorities_of_the_client_and_unknown_frames_change_nothing() -> None:
    server = started()
    sent = server.take(
        frame(GOAWAY, 0, 0, bytes(8) + b"farewell"),
        frame(PRIORITY, 0, 1, bytes(5)),
        frame(PRIORITY, 0, 2, bytes(5)),
        frame(0x10, 255, 0, b"update"),
        frame(200, 255, 77, b"unknown"),
        frame(SETTINGS, ACK, 0),
        settings((1, 0), (99, 2**32 - 1), (6, 0)),
        frame(PING, ACK, 0, bytes(8)),
        frame(HEADERS, END_HEADERS | 0x40, 2**31 | 1, REQUEST_BLOCK),
    )
    assert sent == [(SETTINGS, ACK, 0, b"")]
    assert server.events == [("pinged", True), ("begun", 1, False)]


def test_the_engine_tells_its_bounds_first() -> None:
    server = Server(max_streams=7)
    sent = list(frames(server.engine.output()))
    assert [it.kind for it in sent] == [SETTINGS, WINDOW_UPDATE]
    assert not server.engine.is_open
    server.take(START)
    assert server.engine.is_open
