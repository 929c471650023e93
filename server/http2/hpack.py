"""Header blocks of HTTP/2 (RFC 7541): bytes in, headers out; for answers, bytes that need no state.

A gRPC client's calls differ in a few headers, so that most of a block are
references into tables, a byte each. A block that leaves the dynamic table as it
was means the same again: what was made of it is looked up whole.

Strings in Huffman's code are decoded by the package `hpack`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from hpack import HPACKDecodingError
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

from server.http2.wire import Header

MAX_TABLE_BYTES = 4096
"""Of the dynamic table; the protocol's default, which is not changed."""

MAX_LIST_BYTES = 64 * 1024
"""Of all headers of a block; further ones are counted, and not kept."""

MAX_COUNTED_BYTES = 4 * 1024 * 1024
"""Of all headers of a block. A byte can stand for an entry of the table, so that the block's own size is no bound."""

MAX_CODED_BYTES = 64 * 1024
"""Of the strings in Huffman's code in a block, which take half a microsecond a byte."""

ENTRY_OVERHEAD = 32
"""Bytes of a header beside its name and value, in all limits (RFC 7541, 4.1, and RFC 9113, 6.5.2)."""

_STATIC: tuple[Header, ...] = tuple((bytes(name), bytes(value)) for name, value in HeaderTable.STATIC_TABLE)
_CACHED_BLOCKS = 256
_CACHED_BYTES = 1024  # of a block or a string; longer ones are rarely sent twice
_CACHED_LIST_BYTES = 2048  # of all headers of a block, which may be short and say much
_MAX_RESIZES = 2  # of the table in a block (RFC 7541, 4.2)

Head = TypeVar("Head")


class InvalidBlock(ValueError):
    """A block that breaks the rules or a bound: the tables of both sides may differ from here on."""


class Decoder(Generic[Head]):
    """The decoder of one connection: what a block means depends on those before it."""

    __slots__ = ("_cache", "_coded", "_dynamic", "_limit", "_make", "_size")

    def __init__(self, make: Callable[[list[Header], int], Head]) -> None:
        """Begin with empty tables.

        Args:
            make: is given the headers of a block, in order, and the bytes of all of
                them, of which those beyond `MAX_LIST_BYTES` are left out. What it
                gives may serve for several equal blocks.
        """
        self._make = make
        self._dynamic: list[Header] = []  # the newest first
        self._size = 0
        self._coded = 0  # bytes in Huffman's code of this block
        self._limit = MAX_TABLE_BYTES
        self._cache: dict[bytes, Head] = {}  # blocks that left the dynamic table as it is now

    def decode(self, block: bytes) -> Head:
        """Return what is made of the headers of a block.

        Raises:
            InvalidBlock: it breaks the rules or a bound.
        """
        if (known := self._cache.get(block)) is not None:
            return known
        headers: list[Header] = []
        position, end, size, resizes = 0, len(block), 0, 0
        self._coded = 0
        is_pure = True
        try:
            while position < end:
                first = block[position]
                if first & 0x80:  # a header of the tables
                    index = first & 0x7F
                    position += 1
                    if index == 0x7F:
                        index, position = _number(block, position, index)
                    header = self._entry(index)
                elif first & 0x40:  # a literal that becomes the newest of the dynamic table
                    header, position = self._literal(block, position, 0x3F)
                    self._add(header)
                    is_pure = False
                elif first & 0x20:  # a new size of the dynamic table
                    resizes += 1
                    if size or resizes > _MAX_RESIZES:
                        raise InvalidBlock("the size of the table changes at the beginning of a block, at most twice")
                    limit, position = _prefixed(block, position, 0x1F)
                    if limit > MAX_TABLE_BYTES:
                        raise InvalidBlock(f"a table of {limit} bytes; {MAX_TABLE_BYTES} is the most")
                    self._limit = limit
                    self._evict(0)
                    is_pure = False
                    continue
                else:  # a literal that is not kept
                    header, position = self._literal(block, position, 0x0F)
                size += len(header[0]) + len(header[1]) + ENTRY_OVERHEAD
                if size <= MAX_LIST_BYTES:
                    headers.append(header)
                elif size > MAX_COUNTED_BYTES:
                    raise InvalidBlock(f"headers of more than {MAX_COUNTED_BYTES} bytes")
        except IndexError:
            raise InvalidBlock("the block ends within a header") from None
        head = self._make(headers, size)
        if not is_pure:
            self._cache.clear()
        elif end <= _CACHED_BYTES and size <= _CACHED_LIST_BYTES and len(self._cache) < _CACHED_BLOCKS:
            self._cache[block] = head
        return head

    def _entry(self, index: int) -> Header:
        if 0 < index <= len(_STATIC):
            return _STATIC[index - 1]
        place = index - len(_STATIC) - 1
        if not 0 <= place < len(self._dynamic):
            raise InvalidBlock(f"no header {index} is in the tables")
        return self._dynamic[place]

    def _literal(self, block: bytes, position: int, mask: int) -> tuple[Header, int]:
        index, position = _prefixed(block, position, mask)
        if index:
            name = self._entry(index)[0]
        else:
            name, position = self._string(block, position)
        value, position = self._string(block, position)
        return (name, value), position

    def _string(self, block: bytes, position: int) -> tuple[bytes, int]:
        length, start = _prefixed(block, position, 0x7F)
        stop = start + length
        if stop > len(block):
            raise InvalidBlock("the block ends within a string")
        text = block[start:stop]
        if block[position] & 0x80:
            self._coded += length
            if self._coded > MAX_CODED_BYTES:
                raise InvalidBlock(f"more than {MAX_CODED_BYTES} bytes in Huffman's code")
            text = _known_plain(text) if length <= _CACHED_BYTES else _plain(text)
        return text, stop

    def _add(self, header: Header) -> None:
        size = len(header[0]) + len(header[1]) + ENTRY_OVERHEAD
        self._evict(size)
        if size <= self._limit:  # else the table is empty now, which is no error
            self._dynamic.insert(0, header)
            self._size += size

    def _evict(self, room: int) -> None:
        """Drop the oldest entries until there is so much room."""
        while self._dynamic and self._size + room > self._limit:
            name, value = self._dynamic.pop()
            self._size -= len(name) + len(value) + ENTRY_OVERHEAD


def encode(headers: Iterable[Header]) -> bytes:
    """A block of literals that are not kept, in plain bytes: it means the same wherever it is sent."""
    block = bytearray()
    for name, value in headers:
        block.append(0)
        for text in (name, value):
            _append_number(block, len(text), 0x7F)
            block += text
    return bytes(block)


def _append_number(block: bytearray, number: int, mask: int) -> None:
    if number < mask:
        block.append(number)
        return
    block.append(mask)
    number -= mask
    while number >= 0x80:
        block.append(number & 0x7F | 0x80)
        number >>= 7
    block.append(number)


def _prefixed(block: bytes, position: int, mask: int) -> tuple[int, int]:
    """A number whose first bits are in the byte at a position, and the position behind it."""
    number = block[position] & mask
    return (number, position + 1) if number < mask else _number(block, position + 1, number)


def _number(block: bytes, position: int, number: int) -> tuple[int, int]:
    for shift in (0, 7, 14, 21):
        byte = block[position]
        position += 1
        number += (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise InvalidBlock("a number of more than four bytes")


def _plain(text: bytes) -> bytes:
    """What a text in Huffman's code says."""
    try:
        return bytes(decode_huffman(text))
    except HPACKDecodingError as error:
        raise InvalidBlock("a string is not in Huffman's code") from error


_known_plain = functools.lru_cache(maxsize=1024)(_plain)
