"""gRPC's framing: messages whole whatever cuts them, and nothing over a limit, whatever is announced."""

from __future__ import annotations

import base64
import contextlib
import gzip
import itertools
import struct
import urllib.parse
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.http2 import wire
from server.http2.wire import (
    INTERNAL,
    PREFIX_BYTES,
    RESOURCE_EXHAUSTED,
    UNIMPLEMENTED,
    Deframer,
    WireError,
    framed,
    metadata_of,
    percent_encoded,
    seconds_of,
    trailers_of,
)

LIMIT = 1000
ENCODINGS = [b"identity", b"deflate", b"gzip"]
MESSAGES = st.lists(st.binary(max_size=LIMIT) | st.just(b""), max_size=6)
CUTS = st.lists(st.integers(0, 10_000), max_size=20)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The data in pieces, some of them empty."""
    bounds = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:stop] for start, stop in itertools.pairwise(bounds)]


def prefixed(content: bytes, flag: int = 0) -> bytes:
    return struct.pack(">BI", flag, len(content)) + content


def fed(deframer: Deframer, data: bytes) -> list[bytes]:
    """What the messages say that are whole with these bytes."""
    return [deframer.opened(message) for message in deframer.feed(data)]


def error_of(deframer: Deframer, data: bytes) -> WireError:
    with pytest.raises(WireError) as error:
        fed(deframer, data)
    return error.value


@given(MESSAGES, CUTS, st.sampled_from(ENCODINGS))
def test_messages_come_whole_and_in_order_wherever_they_are_cut(
    messages: list[bytes], places: list[int], encoding: bytes
) -> None:
    deframer = Deframer(LIMIT + 100, encoding)
    came: list[bytes] = []
    for piece in cut(b"".join(framed(message, encoding) for message in messages), places):
        came += fed(deframer, piece)
    deframer.end()
    assert came == messages
    assert deframer.buffered == 0


@given(st.binary(max_size=LIMIT), CUTS)
def test_what_is_not_whole_yet_is_counted_as_buffered(message: bytes, places: list[int]) -> None:
    deframer = Deframer(LIMIT)
    size = 0
    for piece in cut(framed(message)[:-1], places):
        assert deframer.feed(piece) == []
        size += len(piece)
        assert deframer.buffered == size


def test_messages_that_are_compressed_and_plain_ones_may_alternate() -> None:
    data = framed(b"plain") + framed(b"tight", b"gzip") + framed(b"plain again")
    assert fed(Deframer(LIMIT, b"gzip"), data) == [b"plain", b"tight", b"plain again"]


@pytest.mark.parametrize("size", [LIMIT, LIMIT + 1])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("is_cut", [False, True])
def test_a_message_of_the_limit_passes_and_one_byte_more_does_not(size: int, encoding: bytes, is_cut: bool) -> None:
    deframer = Deframer(LIMIT, encoding)
    data = framed(bytes(size), encoding)
    if is_cut:
        assert deframer.feed(data[:3]) == []
        data = data[3:]
    if size <= LIMIT:
        assert fed(deframer, data) == [bytes(size)]
    else:
        error = error_of(deframer, data)
        assert error.number == RESOURCE_EXHAUSTED
        assert str(error).startswith(f"SERVER: Received message larger than max ({LIMIT + 1}")


@pytest.mark.parametrize("length", [LIMIT + 1, 2**31, 2**32 - 1])
def test_a_length_over_the_limit_is_refused_before_any_of_its_bytes(length: int) -> None:
    deframer = Deframer(LIMIT)
    prefix = struct.pack(">BI", 0, length)
    assert deframer.feed(prefix[:-1]) == []
    assert error_of(deframer, prefix[-1:]).number == RESOURCE_EXHAUSTED


@pytest.mark.parametrize("encoding", [b"deflate", b"gzip"])
def test_a_bomb_is_not_inflated(encoding: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    real = zlib.decompressobj

    class Inflater:
        def __init__(self, bits: int) -> None:
            self._inner = real(bits)

        def decompress(self, content: bytes, limit: int) -> bytes:
            nonlocal most
            inflated = self._inner.decompress(content, limit)
            most = max(most, len(inflated))
            return inflated

    bomb = framed(bytes(10_000_000), encoding)
    assert len(bomb) < 20_000
    monkeypatch.setattr("server.http2.wire.zlib.decompressobj", Inflater)
    error = error_of(Deframer(20_000, encoding), bomb)
    assert error.number == RESOURCE_EXHAUSTED
    assert most == 20_001


def test_a_compressed_message_stays_as_it_came_until_it_is_wanted() -> None:
    deframer = Deframer(LIMIT, b"gzip")
    (message,) = deframer.feed(framed(bytes(LIMIT), b"gzip"))
    assert len(message) < 50
    assert deframer.opened(message) == bytes(LIMIT)


@pytest.mark.parametrize("flag", range(2, 256))
def test_a_message_begins_with_0_or_1(flag: int) -> None:
    for encoding in ENCODINGS:
        assert error_of(Deframer(LIMIT, encoding), prefixed(b"abc", flag)).number == INTERNAL


def test_a_message_is_compressed_only_in_a_call_that_says_how() -> None:
    assert error_of(Deframer(LIMIT), framed(b"abc", b"gzip")).number == INTERNAL


@pytest.mark.parametrize("encoding", [b"", b"br", b"GZIP", b"snappy", b"identity,gzip", b"\xff", b"x" * 100_000])
def test_an_unknown_encoding_is_named_and_shortly(encoding: bytes) -> None:
    with pytest.raises(WireError, match="one of identity, deflate, gzip, not") as error:
        Deframer(LIMIT, encoding)
    assert error.value.number == UNIMPLEMENTED
    assert len(str(error.value)) < 100


WHOLE = gzip.compress(b"digits" * 20)


@pytest.mark.parametrize(
    "content",
    [b"", b"plain", WHOLE[:-1], WHOLE[:10], WHOLE + b"more", WHOLE + WHOLE, WHOLE[:-5] + b"\0" + WHOLE[-4:]],
    ids=["empty", "plain", "short", "head", "longer", "twice", "checksum"],
)
def test_what_is_no_one_whole_gzip_stream_is_refused(content: bytes) -> None:
    assert error_of(Deframer(LIMIT, b"gzip"), prefixed(content, 1)).number == INTERNAL


def test_deflate_is_zlib_s_format_and_not_the_bare_one() -> None:
    assert fed(Deframer(LIMIT, b"deflate"), prefixed(zlib.compress(b"abc"), 1)) == [b"abc"]
    bare = zlib.compressobj(wbits=-15)
    assert error_of(Deframer(LIMIT, b"deflate"), prefixed(bare.compress(b"abc") + bare.flush(), 1)).number == INTERNAL


@given(st.binary(max_size=100), CUTS, st.sampled_from(ENCODINGS))
def test_any_bytes_are_messages_or_an_error_wherever_they_are_cut(
    data: bytes, places: list[int], encoding: bytes
) -> None:
    def outcome(pieces: list[bytes]) -> tuple[list[bytes], int | None]:
        deframer = Deframer(50, encoding)
        came: list[bytes] = []
        try:
            for piece in pieces:
                came += deframer.feed(piece)
            deframer.end()
        except WireError as error:
            return came + error.messages, error.number
        return came, None

    assert outcome(cut(data, places)) == outcome([data])


def test_messages_before_a_broken_one_are_not_lost() -> None:
    error = error_of(Deframer(LIMIT), framed(b"one") + framed(b"two") + prefixed(b"three", 7))
    assert error.messages == [b"one", b"two"]


@pytest.mark.parametrize("bad", [prefixed(bytes(LIMIT + 1)), prefixed(b"x", 2)])
@pytest.mark.parametrize("good", [[], [b"good"]])
def test_the_end_of_a_broken_stream_is_no_second_error(bad: bytes, good: list[bytes]) -> None:
    deframer = Deframer(LIMIT)
    assert error_of(deframer, b"".join(map(framed, good)) + bad).messages == good
    deframer.end()
    assert deframer.buffered == 0


@pytest.mark.parametrize("length", range(1, PREFIX_BYTES + 3))
def test_a_stream_that_ends_within_a_message_is_truncated(length: int) -> None:
    deframer = Deframer(LIMIT)
    assert deframer.feed(framed(b"whole") + framed(b"abc")[:length]) == [b"whole"]
    with pytest.raises(WireError, match=f"after {length} bytes of it") as error:
        deframer.end()
    assert error.value.number == INTERNAL


# Headers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [
        (b"2H", 7200.0),
        (b"3M", 180.0),
        (b"4S", 4.0),
        (b"5m", 0.005),
        (b"6u", 6e-6),
        (b"7n", 7e-9),
        (b"0S", 0.0),
        (b"00000001S", 1.0),
        (b"99999999H", 99999999 * 3600.0),
    ],
)
def test_a_timeout_is_a_number_and_its_unit(timeout: bytes, seconds: float) -> None:
    assert seconds_of(timeout) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    "timeout",
    [
        b"",
        b"S",
        b"1",
        b"1s",
        b"1h",
        b"-1S",
        b"+1S",
        b"1.5S",
        b" 1S",
        b"1S ",
        b"1S\n",
        b"1 S",
        b"123456789S",
        b"1SS",
        b"1_0S",
        b"1e3S",
        b"\xd9\xa1S",
        b"\xffS",
        b"1" * 10_000 + b"S",
    ],
)
def test_what_is_no_timeout_is_refused(timeout: bytes) -> None:
    with pytest.raises(WireError, match="1 to 8 digits") as error:
        seconds_of(timeout)
    assert error.value.number == INTERNAL
    assert len(str(error.value)) < 120


@given(st.integers(0, 99_999_999), st.sampled_from(b"HMSmun"))
def test_every_timeout_of_the_protocol_is_read(number: int, unit: int) -> None:
    scale = {"H": 3600e9, "M": 60e9, "S": 1e9, "m": 1e6, "u": 1e3, "n": 1}[chr(unit)]
    assert seconds_of(b"%d%c" % (number, unit)) * 1e9 == pytest.approx(number * scale)


def test_metadata_is_what_is_not_the_protocol_s_in_order() -> None:
    headers = [
        (b":method", b"POST"),
        (b":path", b"/a/B"),
        (b":scheme", b"http"),
        (b":authority", b"here"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"grpc-timeout", b"1S"),
        (b"grpc-encoding", b"gzip"),
        (b"grpc-accept-encoding", b"gzip"),
        (b"user-agent", b"test"),
        (b"b", b"2"),
        (b"a", b"1,2"),
        (b"b", b""),
        (b"utf", "ä".encode()),
        (b"latin", b"\xe4"),
        (b"grpc-previous-rpc-attempts", b"1"),
    ]
    assert metadata_of(headers) == (
        ("user-agent", "test"),
        ("b", "2"),
        ("a", "1,2"),
        ("b", ""),
        ("utf", "ä"),
        ("latin", b"\xe4"),
        ("grpc-previous-rpc-attempts", "1"),
    )


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=4), st.data())
def test_binary_metadata_comes_with_padding_or_without_and_several_in_a_header(
    values: list[bytes], data: st.DataObject
) -> None:
    texts = [base64.b64encode(value) for value in values]
    texts = [text.rstrip(b"=") if data.draw(st.booleans()) else text for text in texts]
    joined = data.draw(st.sampled_from([b",", b", ", b" , "])).join(texts)
    assert metadata_of([(b"key-bin", joined)]) == tuple(("key-bin", value) for value in values)


@pytest.mark.parametrize("value", [b"A", b"AAA\0", b"AA=A", b"A A=", b"====", b"AA-_", b"AAAA,A", b"\xff\xff"])
def test_binary_metadata_that_is_no_base64_is_refused(value: bytes) -> None:
    with pytest.raises(WireError, match="metadata key-bin is no base64") as error:
        metadata_of([(b"key-bin", value)])
    assert error.value.number == INTERNAL


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=8) | st.just(b"x-bin"), st.binary(max_size=8))))
def test_any_headers_are_metadata_or_an_error(headers: list[wire.Header]) -> None:
    with contextlib.suppress(WireError):
        assert all(isinstance(key, str) for key, _ in metadata_of(headers))


@given(st.text(max_size=50))
def test_a_message_is_what_it_was_when_its_percents_are_decoded(message: str) -> None:
    encoded = percent_encoded(message)
    assert urllib.parse.unquote(encoded.decode("ascii")) == message
    assert all(0x20 <= byte <= 0x7E for byte in encoded)
    assert encoded.strip() == encoded


@pytest.mark.parametrize(
    ("message", "encoded"),
    [
        ("plain text, all of it: (~)", b"plain text, all of it: (~)"),
        ("100%", b"100%25"),
        ("é\r\n", b"%C3%A9%0D%0A"),
        ("\x7f\x1f", b"%7F%1F"),
        (" a b ", b"%20a b%20"),
        (" ", b"%20"),
        ("", b""),
        ("\ud800", b"?"),
    ],
)
def test_all_but_printable_ascii_is_encoded_and_spaces_at_the_ends(message: str, encoded: bytes) -> None:
    assert percent_encoded(message) == encoded


def test_trailers_are_the_status_its_message_and_metadata() -> None:
    assert trailers_of(0) == [(b"grpc-status", b"0")]
    assert trailers_of(13, "50% ä", (("key", "value"), ("raw", b"\xe4"), ("some-bin", b"\0\xff"))) == [
        (b"grpc-status", b"13"),
        (b"grpc-message", b"50%25 %C3%A4"),
        (b"key", b"value"),
        (b"raw", b"\xe4"),
        (b"some-bin", b"AP8"),
    ]


@given(st.binary(max_size=30))
def test_binary_metadata_goes_the_whole_way(value: bytes) -> None:
    assert metadata_of(trailers_of(5, metadata=(("key-bin", value),))[1:]) == (("key-bin", value),)
