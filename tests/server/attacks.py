"""What ends gRPC's server, for several tests."""

from __future__ import annotations

import asyncio
import os
import ssl

import psutil

from server.http2.engine import PREFACE
from server.http2.hpack import encode
from tests.server.http2.peer import END_HEADERS, END_STREAM, GOAWAY, HEADERS, REQUEST, SETTINGS, frame

TIMEOUT = 30


async def call_a_path_that_is_no_text(
    address: str, *, transport: str = "grpcio", context: ssl.SSLContext | None = None
) -> None:
    """Wait until a server of this process that this ends has left its port to another one; else for the answer."""
    block = encode([(name, b"/\xff" if name == b":path" else value) for name, value in REQUEST])
    last = GOAWAY if transport == "grpcio" else HEADERS
    async with asyncio.timeout(TIMEOUT):
        reader, writer = await asyncio.open_connection(*address.rsplit(":", 1), ssl=context)
        writer.write(PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_HEADERS | END_STREAM, 1, block))
        kind = -1
        while kind != last:
            head = await reader.readexactly(9)
            kind = head[3]
            await reader.readexactly(int.from_bytes(head[:3]))
        writer.close()
        while listeners(address, os.getpid()) > 1:  # noqa: ASYNC110 (the system tells nobody)
            await asyncio.sleep(0.005)


def listeners(address: str, process: int) -> int:
    """How many sockets of a process and those that it started listen at this port."""
    parent = psutil.Process(process)
    port = int(address.rpartition(":")[2])
    return sum(
        connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        for each in (parent, *parent.children())
        for connection in each.net_connections("tcp")
    )
