"""What a connection may do, and for how long: gRPC's options against abuse.

Knows nothing of what is sent over it: the limits of messages, images and the
queue stand where these are handled.
"""

from __future__ import annotations

from server.settings import Settings

MAX_STREAMS = 128
"""Open calls of one connection; a gRPC client holds further ones back until one ends.

A call costs the event loop about half a millisecond, and they are taken in one
by one. So a client that sends more than the server can do has its calls wait on
its own side, where their deadlines are, and not before the health checks of
others. 64 callers, with which the server is near its full throughput, are below.
"""

MAX_PENDING_CALLS = 1_000_000
"""Calls that have come and not been taken in; over its own limit of 1,000 gRPC ends some without a hint to retry."""

MAX_METADATA_BYTES = 16 * 1024
"""All headers of a call. Ours are a few hundred bytes; this is room for traces and a long token."""

HANDSHAKE_SECONDS = 10.0
"""From the connection to the end of the TLS handshake and the client's first HTTP/2 settings."""

MIN_PING_INTERVAL_SECONDS = 30.0
"""Between two pings of a client, with open calls or without. The SDK sends one a minute."""

MAX_PING_STRIKES = 2
"""Pings that came too early; after one more the connection is closed (GOAWAY, ENHANCE_YOUR_CALM)."""

KEEPALIVE_SECONDS = 120.0
"""After so long without a word from a client it is pinged, as it may be gone without a farewell."""

KEEPALIVE_TIMEOUT_SECONDS = 20.0
"""A client that does not answer such a ping within this is taken for gone."""

_NEVER = 2**31 - 1  # how gRPC writes infinity, in milliseconds


def connection_options(settings: Settings) -> list[tuple[str, int]]:
    """gRPC's options that limit connections."""
    options = [
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
        # Both, as between the first and the second gRPC refuses by chance.
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.server_handshake_timeout_ms", _milliseconds(HANDSHAKE_SECONDS)),
        # These two belong together: without the second, a client without calls may ping once in two hours. The first
        # is spelled as gRPC reads it; its documentation's name, with `recv` in it, is that of a macro.
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(MIN_PING_INTERVAL_SECONDS)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_ping_strikes", MAX_PING_STRIKES),
        ("grpc.keepalive_time_ms", _milliseconds(KEEPALIVE_SECONDS)),
        # gRPC waits for the answer to a ping as long as the second says; older versions obey the first.
        ("grpc.keepalive_timeout_ms", _milliseconds(KEEPALIVE_TIMEOUT_SECONDS)),
        ("grpc.http2.ping_timeout_ms", _milliseconds(KEEPALIVE_TIMEOUT_SECONDS)),
    ]
    if settings.max_connection_age:
        options += [
            ("grpc.max_connection_age_ms", _milliseconds(settings.max_connection_age)),
            # gRPC's own default is no end, and a stream would keep its old connection for ever.
            ("grpc.max_connection_age_grace_ms", _milliseconds(settings.max_connection_age_grace)),
        ]
    return options


def _milliseconds(seconds: float) -> int:
    return min(round(seconds * 1000), _NEVER)
