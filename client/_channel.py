"""How a server is reached: addresses, TLS, token, metadata, and the options of gRPC's channels.

Does no I/O but to read the files of certificates when a channel is opened.
Knows nothing of calls, and nothing of how they are spread over several channels.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from client import _request_id
from protos.mnist.v1 import digit_classifier_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["DigitClassifier"].full_name

TARGET_VARIABLE = "MNIST_GRPC_TARGET"
DEFAULT_PORT = 50051
DEFAULT_TARGET = f"localhost:{DEFAULT_PORT}"
PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Where gRPC looks for a proxy, in this order, and in this spelling only."""
NO_PROXY_VARIABLES = ("no_grpc_proxy", "no_proxy")

RETRY_BUFFER_BYTES = 4 * 1024 * 1024  # what a full chunk needs; gRPC retries nothing longer than this
INITIAL_RECONNECT_BACKOFF_MS = 100  # gRPC's own second would outlast a call's retries
MAX_RECONNECT_BACKOFF_MS = 5_000  # a server that comes back is found within about this time
KEEPALIVE_MS = 60_000
"""Between two pings while calls are open. The server closes connections that ping more often than every 30 s, twice."""
KEEPALIVE_TIMEOUT_MS = 20_000
MAX_CONNECTIONS = 128

_SCHEMES = ("dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds")
_TOKEN = re.compile(r"[\x21-\x7e]+")
_KEY = re.compile(r"[a-z0-9_.-]+")

Secret: TypeAlias = "str | Callable[[], str] | None"
Pem: TypeAlias = "str | os.PathLike[str] | bytes | None"
Options: TypeAlias = "list[tuple[str, str | int]]"


@dataclass(frozen=True, slots=True)
class TLS:
    """What `Client(tls=…)` needs beyond `True`, which is TLS with the authorities that gRPC brings.

    >>> digits = client.Client("digits.example:50051", tls=client.TLS(ca="ca.pem"))
    """

    ca: Pem = None
    """Authorities to trust: a path, or the bytes of PEM; None for those that gRPC brings."""

    certificate: Pem = None
    """Of this client, where the server asks for one (mTLS): a path, or the bytes of PEM."""

    key: Pem = field(default=None, repr=False)
    """The private key of `certificate`: a path, or the bytes of PEM."""

    server_name: str | None = None
    """The name that the server's certificate has to have, where it is not the host of the target."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a client's certificate and its key are given together: TLS(certificate=…, key=…)")
        for name in ("ca", "certificate", "key"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (str, bytes, os.PathLike)):
                raise TypeError(f"TLS(…, {name}=…) takes a path or the bytes of PEM, not {type(value).__name__}")
            if isinstance(value, str) and "-----BEGIN" in value:
                raise ValueError(
                    f"TLS(…, {name}=…) takes a path or the bytes of PEM; .encode() makes bytes of this text"
                )


@dataclass(frozen=True, slots=True)
class ChannelSettings:
    """All that concerns the connection; made by `channel_settings`, which checks it."""

    target: str
    """What errors say: `host:port`, or several with commas between."""

    servers: tuple[str, ...]
    """gRPC's targets; calls go to all of those that can be reached. One target may stand for several addresses."""

    tls: TLS | None = None
    token: Secret = field(default=None, repr=False)
    metadata: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    interceptors: tuple[Any, ...] = ()
    connections: int = 1
    wait_for_ready: bool = False

    def metadata_of_call(self, request_id: str) -> tuple[tuple[str, str], ...]:
        """What goes with a call, the token as it is at this moment.

        Raises:
            ValueError: the token is none.
        """
        own = (*self.metadata, (_request_id.KEY, request_id))
        if self.token is None:
            return own
        token = self.token if isinstance(self.token, str) else self.token()
        return (*own, ("authorization", f"Bearer {_checked_token(token)}"))


def channel_settings(
    target: str | Sequence[str] | None = None,
    *,
    tls: bool | TLS = False,
    token: Secret = None,
    metadata: Mapping[str, str] | None = None,
    interceptors: Sequence[Any] = (),
    connections: int = 1,
    wait_for_ready: bool = False,
) -> ChannelSettings:
    """The settings of a client, checked.

    Raises:
        ValueError: one of them breaks a rule, which the message tells.
    """
    addresses = _addresses(target)
    if not isinstance(connections, int) or not 1 <= connections <= MAX_CONNECTIONS:
        raise ValueError(f"connections is a number from 1 to {MAX_CONNECTIONS}, not {connections!r}")
    secure = TLS() if tls is True else tls or None
    if secure is not None:
        if not isinstance(secure, TLS):
            raise TypeError(f"tls is True, False or client.TLS(…), not {type(secure).__name__}")
        _read_all(secure)  # that what is wrong is told here; they are read again by each opening
    if isinstance(token, str):
        _checked_token(token)
    if token is not None and secure is None and (open_to := [each for each in addresses if not is_local(each)]):
        raise ValueError(
            f"{open_to[0]}: a token is not sent in plaintext to another machine, as everybody on the way could read "
            "it; give tls=True. Where the network itself encrypts (a service mesh), send the header yourself: "
            'metadata={"authorization": "Bearer …"}'
        )
    return ChannelSettings(
        target=",".join(addresses),
        servers=_servers(addresses, secure),
        tls=secure,
        token=token,
        metadata=_checked_metadata(metadata or {}, has_token=token is not None),
        interceptors=tuple(interceptors),
        connections=connections,
        wait_for_ready=bool(wait_for_ready),
    )


# Targets --------------------------------------------------------------------------


def resolve_target(target: str | Sequence[str] | None) -> str:
    """The target given, else that of the environment, else localhost:50051; several with commas between."""
    return ",".join(_addresses(target))


def is_local(address: str) -> bool:
    """Whether what is sent there stays on this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = re.sub(r"^(dns:(//[^/]*/)?|ipv[46]:)", "", address).rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _addresses(target: str | Sequence[str] | None) -> list[str]:
    """The addresses that were asked for, each with a port, none twice."""
    if target is None or target == "":
        target = os.environ.get(TARGET_VARIABLE) or DEFAULT_TARGET
    given = target.split(",") if isinstance(target, str) and not _scheme(target) else target
    if not isinstance(given, Iterable) or isinstance(given, bytes):
        raise TypeError(f"a target is text such as 'localhost:{DEFAULT_PORT}', or a list of them, not {target!r}")
    several = [given] if isinstance(given, str) else list(given)
    if not several:
        raise ValueError("no target: the list of servers is empty; give one host:port or more")
    return list(dict.fromkeys(_address(each) for each in several))


def _scheme(target: str) -> str | None:
    """The scheme of gRPC's that a target begins with."""
    scheme, colon, _ = target.partition(":")
    return scheme if colon and scheme in _SCHEMES else None


def _address(text: str) -> str:
    """One address with its port.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(text, str):
        raise TypeError(f"a target is text such as 'localhost:{DEFAULT_PORT}', not {type(text).__name__}")
    text = text.strip()
    if url := re.match(r"(https?|grpcs?|tcp)://([^/]*)", text):
        tls = ", tls=True" if url[1] in ("https", "grpcs") else ""
        raise ValueError(
            f"a target is host:port, not a URL such as {text!r}: Client({url[2] or f'localhost:{DEFAULT_PORT}'!r}{tls})"
        )
    if not text or re.search(r"\s", text):
        raise ValueError(f"a target is host:port, for example {DEFAULT_TARGET!r}, not {text!r}")
    scheme = _scheme(text)
    if scheme in ("ipv4", "ipv6"):
        return f"{scheme}:" + ",".join(_literal(each, scheme, text) for each in text.partition(":")[2].split(","))
    if scheme not in (None, "dns"):
        return text
    prefix, name = ("", text) if scheme is None else _dns_parts(text)
    return prefix + _with_port(name, text)


def _literal(address: str, scheme: str, text: str) -> str:
    """An address in numbers, with its port, of a target with this scheme."""
    with_port = _with_port(address, text)
    host = with_port.rpartition(":")[0].strip("[]")
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        version = None
    if scheme != f"ipv{version}":
        raise ValueError(f"after {scheme}: comes an IPv{scheme[-1]} address and its port, not {host!r} as in {text!r}")
    return with_port


def _dns_parts(text: str) -> tuple[str, str]:
    prefix = re.match(r"dns:(//[^/]*/)?", text)
    assert prefix is not None
    return prefix[0], text[prefix.end() :]


def _with_port(name: str, text: str) -> str:
    if name.count(":") > 1 and not name.startswith("["):
        try:
            name = f"[{ipaddress.IPv6Address(name)}]"
        except ValueError:
            raise ValueError(f"a target is host:port, an IPv6 address in brackets: [::1]:50051, not {text!r}") from None
    host, colon, port = (name, "", "") if name.endswith("]") else name.rpartition(":")
    if not colon:
        host, port = name, str(DEFAULT_PORT)  # gRPC would take 443
    if not host or "/" in host or not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ValueError(f"a target is host:port with a port from 1 to 65535, not {text!r}")
    return f"{host}:{port}"


def _servers(addresses: Sequence[str], tls: TLS | None) -> tuple[str, ...]:
    """gRPC's targets for these addresses.

    Literal addresses go into one target, over which the channel itself balances
    and which it leaves alone while they are dead. But not where each is to be
    called by its own name: gRPC checks one name for all of a target against the
    certificate, and tells a proxy all of them as if they were one.
    """
    if len(addresses) == 1:
        return tuple(addresses)
    proxied = proxy_in_use() is not None and not all(map(is_local, addresses))
    if proxied or (tls is not None and tls.server_name is None):
        return tuple(addresses)
    together: dict[str, list[str]] = {"ipv4": [], "ipv6": []}
    servers = []
    for address in addresses:
        family = _literal_family(address)
        if family is None:
            servers.append(address)
        else:
            together[family].append(address)
    return (*(f"{family}:{','.join(literals)}" for family, literals in together.items() if literals), *servers)


def _literal_family(address: str) -> str | None:
    if _scheme(address):
        return None
    try:
        return f"ipv{ipaddress.ip_address(address.rpartition(':')[0].strip('[]')).version}"
    except ValueError:
        return None


def proxy_in_use() -> str | None:
    """The environment variable that names the proxy which gRPC uses for other machines."""
    return next((name for name in PROXY_VARIABLES if os.environ.get(name)), None)


# What goes with every call --------------------------------------------------------


def _checked_token(token: Any) -> str:
    """The token; a sentence about a bad one does not hold it."""
    if not isinstance(token, str):
        raise TypeError(f"a token is text, not {type(token).__name__}")
    token_only: str = token.strip()  # without a file's last line end
    if not _TOKEN.fullmatch(token_only):
        raise ValueError("a token is printable ASCII without spaces; this one is empty, or holds something else")
    return token_only


def _checked_metadata(metadata: Mapping[str, str], *, has_token: bool) -> tuple[tuple[str, str], ...]:
    """The pairs; a sentence about a bad one does not hold the value, which may be a secret."""
    for key, value in metadata.items():
        if not isinstance(key, str) or not _KEY.fullmatch(key) or key.startswith("grpc-") or key.endswith("-bin"):
            raise ValueError(
                f"a key of metadata is lower-case letters, digits, -_. and neither grpc-… nor …-bin, as {key!r} is not"
            )
        if key == _request_id.KEY:
            raise ValueError(f"{key} is an id of one call: with client.request_id('…'): …")
        if key == "authorization" and has_token:
            raise ValueError("authorization is what token=… sends; give one of the two")
        if not isinstance(value, str) or not (value.isascii() and value.isprintable()):
            raise ValueError(f"the value of the metadata {key} is not printable ASCII text")
    return tuple(metadata.items())


def checked_interceptors(interceptors: Sequence[Any], kinds: tuple[type, ...], owner: str) -> tuple[Any, ...]:
    """The interceptors, each of one of these kinds of gRPC's.

    Raises:
        TypeError: one is not.
    """
    for each in interceptors:
        if not isinstance(each, kinds):
            names = ", ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"an interceptor of {owner} is a {kinds[0].__module__} {names}, not {each!r}")
    return tuple(interceptors)


# Channels -------------------------------------------------------------------------


def channel_options(target: str, settings: ChannelSettings | None = None) -> Options:
    """Retries, balancing and keepalive are the channel's work, not a loop of ours."""
    retry = {
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        # CANCELLED: how a server that stops ends calls that it had not begun.
        "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
    }
    config = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{"service": SERVICE, "method": "Classify"}, {"service": SERVICE, "method": "GetModel"}],
                "retryPolicy": retry,
            }
        ],
    }
    options: Options = [
        ("grpc.service_config", json.dumps(config)),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.max_receive_message_length", -1),
        ("grpc.initial_reconnect_backoff_ms", INITIAL_RECONNECT_BACKOFF_MS),
        ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_BACKOFF_MS),
        ("grpc.per_rpc_retry_buffer_size", RETRY_BUFFER_BYTES),
        # Connections are this channel's own: gRPC would share those of channels to one address, so that several were
        # one, and a forked process would get its parent's.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    several = target.startswith(("ipv4:", "ipv6:")) and "," in target
    if is_local(target) or several:
        options.append(("grpc.enable_http_proxy", 0))  # a proxy cannot reach this machine's own addresses, nor a list
    name = settings.tls.server_name if settings is not None and settings.tls is not None else None
    if name is not None:
        options.append(("grpc.ssl_target_name_override", name))
    elif several:  # or the list itself would be the name
        options.append(("grpc.default_authority", target.split(",")[0].partition(":")[2]))
    return options


def open_channels(settings: ChannelSettings) -> list[tuple[int, grpc.Channel]]:
    """Channels, each with the number of its server: `connections` to each server."""
    credentials = _credentials(settings.tls)
    opened = []
    for number, server in _each(settings):
        options = channel_options(server, settings)
        if credentials is None:
            channel = grpc.insecure_channel(server, options)
        else:
            channel = grpc.secure_channel(server, credentials, options)
        opened.append((number, channel))
    return opened


def open_aio_channels(settings: ChannelSettings) -> list[tuple[int, grpc.aio.Channel]]:
    """As `open_channels`, for the event loop that runs, with the interceptors."""
    credentials = _credentials(settings.tls)
    opened = []
    for number, server in _each(settings):
        options = channel_options(server, settings)
        interceptors = list(settings.interceptors)
        if credentials is None:
            channel = grpc.aio.insecure_channel(server, options, interceptors=interceptors)
        else:
            channel = grpc.aio.secure_channel(server, credentials, options, interceptors=interceptors)
        opened.append((number, channel))
    return opened


def _each(settings: ChannelSettings) -> list[tuple[int, str]]:
    return [pair for _ in range(settings.connections) for pair in enumerate(settings.servers)]


def _credentials(tls: TLS | None) -> grpc.ChannelCredentials | None:
    """What gRPC needs for TLS, of files as they are now.

    Raises:
        ValueError: a file cannot be read, or is not PEM.
    """
    if tls is None:
        return None
    return grpc.ssl_channel_credentials(*_read_all(tls))


def _read_all(tls: TLS) -> tuple[bytes | None, bytes | None, bytes | None]:
    """Authorities, key, certificate."""
    return (
        _read_pem("ca", tls.ca, b"CERTIFICATE"),
        _read_pem("key", tls.key, b"PRIVATE KEY"),
        _read_pem("certificate", tls.certificate, b"CERTIFICATE"),
    )


def _read_pem(name: str, source: Pem, kind: bytes) -> bytes | None:
    if source is None or isinstance(source, bytes):
        content, where = source, "the bytes given"
    else:
        where = os.fspath(source)
        try:
            content = Path(source).read_bytes()
        except OSError as error:
            raise ValueError(f"TLS(…, {name}={where!r}): {error.strerror}") from error
    if content is not None and not re.search(rb"-----BEGIN [A-Z ]*" + kind + rb"-----", content):
        raise ValueError(f"TLS(…, {name}=…): no PEM of a {kind.decode().lower()} in {where}")
    return content
