"""The decoder of headers beside the package `hpack`, which is a whole one: the same of every block, in any order."""

from __future__ import annotations

import hpack
import pytest
from hpack.hpack import encode_integer
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hypothesis import given
from hypothesis import strategies as st

from server.http2.hpack import (
    ENTRY_OVERHEAD,
    MAX_CODED_BYTES,
    MAX_COUNTED_BYTES,
    MAX_LIST_BYTES,
    MAX_TABLE_BYTES,
    Decoder,
    InvalidBlock,
    encode,
)
from server.http2.wire import Header

Headers = tuple[list[Header], int]


def decoder() -> Decoder[Headers]:
    return Decoder(lambda headers, size: (list(headers), size))


def decode(block: bytes) -> Headers:
    return decoder().decode(block)


def size_of(headers: list[Header]) -> int:
    return sum(len(name) + len(value) + ENTRY_OVERHEAD for name, value in headers)


def huffman(text: bytes) -> bytes:
    return HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH).encode(text)


def indexed(number: int) -> bytes:
    """A number behind a bit that is set: a header of the tables, or the length of a string in Huffman's code."""
    first, *rest = encode_integer(number, 7)
    return bytes((first | 0x80, *rest))


KNOWN = [b":method", b":path", b"content-type", b"te", b"user-agent", b"grpc-timeout", b"x-request-id"]
NAMES = st.sampled_from(KNOWN) | st.binary(min_size=1, max_size=12)
VALUES = st.sampled_from([b"POST", b"/", b"application/grpc", b"trailers", b"", b"\0\xff"]) | st.binary(max_size=40)
LARGE = st.integers(500, 5000).map(lambda size: b"v" * size)
LISTS = st.lists(st.tuples(NAMES, VALUES | LARGE, st.booleans()), max_size=5)
LITERAL = b"\x40\x01a\x01b"
"""A header that is put into the table: of 34 bytes."""


@given(st.lists(st.tuples(LISTS, st.booleans(), st.none() | st.integers(0, MAX_TABLE_BYTES)), max_size=8), st.data())
def test_all_blocks_of_a_connection_say_what_their_encoder_was_given(
    steps: list[tuple[list[tuple[bytes, bytes, bool]], bool, int | None]], data: st.DataObject
) -> None:
    encoder, ours = hpack.Encoder(), decoder()
    before: list[list[tuple[bytes, bytes, bool]]] = []
    for fresh, is_coded, table in steps:
        if table is not None:
            encoder.header_table_size = table
        # Those of before come again, so that the same block means the same, or not any more.
        again = data.draw(st.integers(0, len(before)))
        headers = before[again - 1] if again else fresh
        before.append(headers)
        expected = [(name, value) for name, value, _ in headers]
        for _ in range(data.draw(st.integers(1, 3))):
            assert ours.decode(encoder.encode(headers, huffman=is_coded)) == (expected, size_of(expected))


@given(st.lists(st.tuples(NAMES, VALUES)))
def test_what_is_encoded_is_what_another_decoder_reads_and_ours(headers: list[Header]) -> None:
    block = encode(headers)
    theirs = hpack.Decoder(max_header_list_size=2**31)
    assert [tuple(header) for header in theirs.decode(block, raw=True)] == headers
    assert decode(block) == (headers, size_of(headers))
    assert len(theirs.header_table.dynamic_entries) == 0


@pytest.mark.parametrize("size", [0, 1, 126, 127, 128, 254, 255, 256, 16_510, 16_511, 60_000])
@pytest.mark.parametrize("is_coded", [False, True])
def test_lengths_of_any_number_of_bytes_are_read_and_written(size: int, is_coded: bool) -> None:
    headers = [(b"n", bytes(b"a" * size))]
    assert decode(encode(headers))[0] == headers
    assert decode(hpack.Encoder().encode(headers, huffman=is_coded))[0] == headers


@given(st.lists(st.binary(max_size=30) | LISTS.map(lambda it: hpack.Encoder().encode(it)), max_size=5))
def test_any_blocks_are_read_as_another_decoder_does_or_refused(blocks: list[bytes]) -> None:
    ours, theirs = decoder(), hpack.Decoder(max_header_list_size=2**31)
    for block in blocks:
        try:
            headers, _ = ours.decode(block)
        except InvalidBlock:
            # The other one is laxer in nothing but the place of a new size, or an overlong number.
            return
        assert [tuple(header) for header in theirs.decode(block, raw=True)] == headers


# RFC 7541, appendix C ----------------------------------------------------------------------

FIRST = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"www.example.com")]
SECOND = [*FIRST, (b"cache-control", b"no-cache")]
THIRD = [
    (b":method", b"GET"),
    (b":scheme", b"https"),
    (b":path", b"/index.html"),
    (b":authority", b"www.example.com"),
    (b"custom-key", b"custom-value"),
]


@pytest.mark.parametrize(
    ("block", "headers"),
    [
        ("400a637573746f6d2d6b65790d637573746f6d2d686561646572", [(b"custom-key", b"custom-header")]),
        ("040c2f73616d706c652f70617468", [(b":path", b"/sample/path")]),
        ("100870617373776f726406736563726574", [(b"password", b"secret")]),
        ("82", [(b":method", b"GET")]),
    ],
    ids=["C.2.1", "C.2.2", "C.2.3", "C.2.4"],
)
def test_the_examples_of_each_representation(block: str, headers: list[Header]) -> None:
    assert decode(bytes.fromhex(block))[0] == headers


@pytest.mark.parametrize(
    "blocks",
    [
        [
            "828684410f7777772e6578616d706c652e636f6d",
            "828684be58086e6f2d6361636865",
            "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565",
        ],
        [
            "828684418cf1e3c2e5f23a6ba0ab90f4ff",
            "828684be5886a8eb10649cbf",
            "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf",
        ],
    ],
    ids=["C.3", "C.4"],
)
def test_the_examples_of_requests(blocks: list[str]) -> None:
    ours = decoder()
    assert [ours.decode(bytes.fromhex(block))[0] for block in blocks] == [FIRST, SECOND, THIRD]


def test_the_examples_of_answers_with_evictions() -> None:
    date, later, place = b"Mon, 21 Oct 2013 20:13:21 GMT", b"Mon, 21 Oct 2013 20:13:22 GMT", b"https://www.example.com"
    cookie = b"foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1"
    lists = [
        [(b":status", b"302"), (b"cache-control", b"private"), (b"date", date), (b"location", place)],
        [(b":status", b"307"), (b"cache-control", b"private"), (b"date", date), (b"location", place)],
        [
            (b":status", b"200"),
            (b"cache-control", b"private"),
            (b"date", later),
            (b"location", place),
            (b"content-encoding", b"gzip"),
            (b"set-cookie", cookie),
        ],
    ]
    for is_coded in (False, True):
        ours, encoder = decoder(), hpack.Encoder()
        encoder.header_table_size = 256  # that of C.5 and C.6
        assert [ours.decode(encoder.encode(headers, huffman=is_coded))[0] for headers in lists] == lists


# Tables and the cache --------------------------------------------------------------------------


def test_a_block_that_comes_again_is_made_into_a_head_once() -> None:
    made: list[list[Header]] = []

    def make(headers: list[Header], size: int) -> int:
        made.append(headers)
        return len(made)

    ours = Decoder(make)
    assert [ours.decode(b"\x82\x86") for _ in range(3)] == [1, 1, 1]
    assert ours.decode(b"\x83") == 2
    ours.decode(LITERAL)
    assert ours.decode(b"\x82\x86") == 4  # the table is another one


@pytest.mark.parametrize("change", [b"\x40\x01n\x01w", b"\x20\x3f\xe1\x1f\x40\x01n\x01w"], ids=["added", "emptied"])
def test_a_block_means_something_else_after_the_table_changed(change: bytes) -> None:
    ours = decoder()
    ours.decode(LITERAL)
    assert [ours.decode(b"\xbe")[0] for _ in range(2)] == [[(b"a", b"b")]] * 2
    ours.decode(change)
    assert [ours.decode(b"\xbe")[0] for _ in range(2)] == [[(b"n", b"w")]] * 2


def test_a_known_block_is_refused_once_its_entry_is_evicted() -> None:
    ours = decoder()
    ours.decode(LITERAL)
    ours.decode(b"\xbe")
    assert ours.decode(b"\x20") == ([], 0)
    with pytest.raises(InvalidBlock, match="no header 62 is in the tables"):
        ours.decode(b"\xbe")


def test_a_header_larger_than_the_table_empties_it_and_is_no_error() -> None:
    ours = decoder()
    ours.decode(LITERAL)
    large = (b"large", b"v" * MAX_TABLE_BYTES)
    block = hpack.Encoder().encode([large], huffman=False)
    assert ours.decode(block)[0] == [large]
    with pytest.raises(InvalidBlock):
        ours.decode(b"\xbe")


def test_a_name_may_be_that_of_the_entry_that_its_header_evicts() -> None:
    ours = decoder()
    name = b"n" * 2000
    ours.decode(b"\x40" + encode([(name, b"v" * 1000)])[1:])
    value = b"w" * 2000
    added = b"\x7e" + encode([(b"", value)])[2:]  # with the name of 62
    assert ours.decode(added)[0] == [(name, value)]
    assert ours.decode(b"\xbe")[0] == [(name, value)]


def test_the_table_is_bounded_by_its_size_with_the_overhead_of_each_entry() -> None:
    ours = decoder()
    entries = MAX_TABLE_BYTES // 34
    for _ in range(3):
        ours.decode(LITERAL * entries)
        last = 61 + entries
        assert ours.decode(indexed(last))[0] == [(b"a", b"b")]
        with pytest.raises(InvalidBlock):
            ours.decode(indexed(last + 1))


def test_neither_many_nor_large_blocks_fill_the_memory() -> None:
    ours = decoder()
    for number in range(2000):
        ours.decode(encode([(b"n", b"%d" % number)]))
    assert len(ours._cache) == 256
    ours = decoder()
    for number in range(300):
        ours.decode(encode([(b"n", b"%d" % number + b"v" * 10_000)]))
    assert len(ours._cache) == 0


def test_sensitive_headers_are_never_in_the_table() -> None:
    ours, encoder = decoder(), hpack.Encoder()
    block = encoder.encode([hpack.NeverIndexedHeaderTuple(b"authorization", b"secret")])
    assert ours.decode(block)[0] == [(b"authorization", b"secret")]
    with pytest.raises(InvalidBlock):
        ours.decode(b"\xbe")


# What breaks the rules -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (b"\x80", "no header 0"),
        (b"\xbe", "no header 62"),
        (b"\xff\xff\xff\xff\x7f", "no header"),
        (b"\x7e\x01a", "no header 62"),
        (b"\x0f\x2f\x01a", "no header 62"),
        (b"\x1f\x2f\x01a", "no header 62"),
        (b"\xff\x80\x80\x80\x80\x01", "more than four bytes"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "more than four bytes"),
        (b"\x00\x7f\x80\x80\x80\x80\x00a", "more than four bytes"),
        (b"\x3f\xff\xff\xff\xff\xff\x01", "more than four bytes"),
        (b"\x82\x20", "at the beginning of a block"),
        (b"\x20\x82\x20", "at the beginning of a block"),
        (b"\x20\x20\x20\x82", "at most twice"),
        (b"\x3f\xe2\x1f", "a table of 4097 bytes"),
        (b"\x00\x01a\x02b", "ends within a string"),
        (b"\x00\x01a\x7f\xff\xff\xff\x7fb", "ends within a string"),
        (b"\x00\x01a\x84\xff\xff\xff\xff", "Huffman"),  # the end of the string, which is never sent
        (b"\x00\x01a\x81\x00", "Huffman"),  # padding of zeroes
        (b"\x00\x01a\x82" + b"\x1f\xff", "Huffman"),  # padding of more than seven bits
        (b"\x00\x01a\x81\xff", "Huffman"),  # of eight
    ],
)
def test_what_breaks_the_rules_is_refused(block: bytes, message: str) -> None:
    with pytest.raises(InvalidBlock, match=message):
        decode(block)


@given(LISTS, st.booleans())
def test_a_block_that_is_cut_anywhere_has_fewer_headers_or_is_refused(
    headers: list[tuple[bytes, bytes, bool]], is_coded: bool
) -> None:
    block = hpack.Encoder().encode(headers, huffman=is_coded)
    whole = [(name, value) for name, value, _ in headers]
    for length in range(min(len(block), 200)):
        try:
            some, _ = decode(block[:length])
        except InvalidBlock:
            continue
        assert some == whole[: len(some)]
        assert len(some) < len(whole)


@pytest.mark.parametrize("length", range(1, 26))
def test_a_header_that_is_cut_anywhere_is_refused(length: int) -> None:
    block = bytes.fromhex("400a637573746f6d2d6b65790d637573746f6d2d686561646572")
    with pytest.raises(InvalidBlock, match="the block ends within a"):
        decode(block[:length])


def test_the_size_may_change_twice_at_the_beginning() -> None:
    ours = decoder()
    ours.decode(LITERAL)
    assert ours.decode(b"\x20\x3f\xe1\x1f\x82")[0] == [(b":method", b"GET")]


# Bounds -----------------------------------------------------------------------------------------------


def test_headers_beyond_the_limit_are_counted_and_not_kept() -> None:
    small, large = (b"small", b"v"), (b"large", b"v" * MAX_LIST_BYTES)
    assert decode(encode([small, large, small])) == ([small], size_of([small, large, small]))
    fitting = (b"n", b"v" * (MAX_LIST_BYTES - 1 - ENTRY_OVERHEAD))
    assert decode(encode([fitting])) == ([fitting], MAX_LIST_BYTES)


def test_headers_beyond_the_limit_go_into_the_table_all_the_same() -> None:
    ours = decoder()
    kept, size = ours.decode(encode([(b"large", b"v" * MAX_LIST_BYTES)]) + LITERAL)
    assert (kept, size) == ([], size_of([(b"large", b"v" * MAX_LIST_BYTES), (b"a", b"b")]))
    assert ours.decode(b"\xbe")[0] == [(b"a", b"b")]


def test_a_byte_that_stands_for_a_large_entry_is_counted_as_that() -> None:
    ours = decoder()
    entry = (b"n", b"v" * 4000)
    ours.decode(b"\x40" + encode([entry])[1:])
    kept, size = ours.decode(b"\xbe" * 1000)
    assert kept == [entry] * (MAX_LIST_BYTES // size_of([entry]))
    assert size == 1000 * size_of([entry])
    with pytest.raises(InvalidBlock, match=f"more than {MAX_COUNTED_BYTES} bytes"):
        ours.decode(b"\xbe" * 2_000_000)


def test_only_so_much_of_a_block_may_be_in_huffman_s_code() -> None:
    coded = huffman(b"a" * 1600)
    literal = b"\0\x01n" + indexed(len(coded)) + coded
    fitting = MAX_CODED_BYTES // len(coded)
    assert decode(literal * fitting)[1] == fitting * size_of([(b"n", b"a" * 1600)])
    with pytest.raises(InvalidBlock, match="in Huffman's code"):
        decode(literal * (fitting + 1))


def test_a_short_block_of_many_headers_is_not_kept() -> None:
    decoder = Decoder(lambda headers, size: (len(headers), size))
    decoder.decode(b"\x40\x01a\x7f\x80\x07" + bytes(1023))  # a long header, which is the newest of the table now
    assert decoder.decode(b"\xbe") == (1, 1 + 1023 + 32)
    assert decoder.decode(b"\xbe" * 100) == (MAX_LIST_BYTES // 1056, 100 * 1056)
    assert list(decoder._cache) == [b"\xbe"]
