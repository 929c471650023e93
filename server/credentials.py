"""TLS: the server's certificate and the authorities of its clients, read again when their files change.

Each handshake uses what the files hold then, so that certificates are renewed
without a restart; connections that are open keep the one that they began with.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from server.errors import CannotServe
from server.secret_files import Contents, WatchedFiles
from server.settings import Settings

_UNUSABLE = {
    "Ed25519": bytes.fromhex("302a300506032b6570032100"),
    "Ed448": bytes.fromhex("3043300506032b6571033a00"),
    "P-521": bytes.fromhex("06072a8648ce3d020106052b81040023"),
}
"""How a certificate (DER) says of what kind its own public key is."""


_MISMATCHES = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}
"""OpenSSL's words for a key that is not the certificate's; the last one when it is of another kind."""


def server_credentials(settings: Settings) -> Callable[[], grpc.ServerCredentials] | None:
    """What makes credentials, for one TLS port each: gRPC opens no second one with the same; None without `tls_cert`.

    Raises:
        CannotServe: a file cannot be read or used, or key and certificate do not match.
    """
    if not settings.tls_cert:
        return None
    files = WatchedFiles(tls_files(settings), lambda contents: _configuration(settings, contents))

    def credentials() -> grpc.ServerCredentials:
        known = files.value

        def changed() -> grpc.ServerCertificateConfiguration | None:
            """Called by gRPC before each handshake, in threads of its own."""
            nonlocal known
            files.look()
            if known is files.value:
                return None
            known = files.value
            return known

        return grpc.dynamic_ssl_server_credentials(
            known,
            changed,  # type: ignore[arg-type]  # None is for no change, which the stub does not know
            require_client_authentication=bool(settings.tls_client_ca),
        )

    return credentials


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """The same for a transport that uses Python's own TLS.

    Raises:
        CannotServe: as `server_credentials`.
    """
    if not settings.tls_cert:
        return None
    context = _RenewedContext(ssl.PROTOCOL_TLS_SERVER)
    context.files = WatchedFiles(tls_files(settings), lambda contents: _context(settings, contents))
    return context


class _RenewedContext(ssl.SSLContext):
    """Begins each connection with the context that belongs to what the files hold then.

    With that one's own sessions, too: a client that resumes a session is not
    verified again, so that those of other files must not be resumed.
    """

    files: WatchedFiles[ssl.SSLContext]

    def wrap_bio(self, *arguments: Any, **named: Any) -> ssl.SSLObject:
        """Called by the event loop for each connection."""
        self.files.look()
        return self.files.value.wrap_bio(*arguments, **named)


def _context(settings: Settings, contents: Contents) -> ssl.SSLContext:
    """A context of the files with these contents.

    Raises:
        CannotServe: the contents cannot be used.
    """
    _configuration(settings, contents)  # checks all there is to check
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_pair(context, settings, contents)
    if settings.tls_client_ca:
        context.load_verify_locations(cadata=_text(contents[settings.tls_client_ca]))
        context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


def tls_files(settings: Settings) -> dict[str, str]:
    """The paths of the settings' PEM files, and what each is."""
    files = {settings.tls_cert: "certificate chain", settings.tls_key: "private key"}
    if settings.tls_client_ca:
        files[settings.tls_client_ca] = "client CA file"
    return files


def _configuration(settings: Settings, contents: Contents) -> grpc.ServerCertificateConfiguration:
    """The files' contents for gRPC, which itself would take what is broken, and then fail handshakes.

    Raises:
        CannotServe: the contents cannot be used.
    """
    chain, key = contents[settings.tls_cert], contents[settings.tls_key]
    _check_certificates(chain, f"the certificate chain {settings.tls_cert}")
    _check_algorithm(chain, settings.tls_cert)
    _load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), settings, contents)
    roots = None
    if settings.tls_client_ca:
        roots = contents[settings.tls_client_ca]
        _check_certificates(roots, f"the client CA file {settings.tls_client_ca}")
    return grpc.ssl_server_certificate_configuration([(key, chain)], roots)


def _check_certificates(content: bytes, what: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=_text(content))
    except ssl.SSLError as error:
        raise CannotServe(f"{what} holds no usable PEM certificates: {_reason(error)}") from error
    except ValueError as error:  # nothing is there at all
        raise CannotServe(f"{what} holds no usable PEM certificates: {error}") from error


def _check_algorithm(chain: bytes, path: str) -> None:
    """Refuse keys with which OpenSSL could serve, but gRPC cannot: its handshakes would fail without a reason."""
    text = _text(chain)
    begin = text.find(ssl.PEM_HEADER)
    end = text.find(ssl.PEM_FOOTER, begin)
    if begin < 0 or end < 0:
        raise CannotServe(f"the certificate chain {path} does not begin with a PEM CERTIFICATE")
    certificate = ssl.PEM_cert_to_DER_cert(text[begin : end + len(ssl.PEM_FOOTER)])
    for name, identifier in _UNUSABLE.items():
        if identifier in certificate:
            raise CannotServe(f"the certificate chain {path} is of a {name} key; gRPC serves RSA, P-256 and P-384 ones")


def _load_pair(context: ssl.SSLContext, settings: Settings, contents: Contents) -> None:
    """Have a context serve with the certificate chain and the private key.

    Raises:
        CannotServe: they cannot be used, or are not of each other.
    """

    def refuse_password() -> str:  # else OpenSSL would ask the terminal
        raise CannotServe(f"the private key {settings.tls_key} is encrypted; the server takes plain ones only")

    try:
        with _path_of(contents[settings.tls_cert]) as chain, _path_of(contents[settings.tls_key]) as key:
            context.load_cert_chain(chain, key, refuse_password)
    except ssl.SSLError as error:
        pair = f"the private key {settings.tls_key} and the certificate chain {settings.tls_cert}"
        if error.reason in _MISMATCHES:
            raise CannotServe(f"{pair} do not match") from error
        if error.reason == "EE_KEY_TOO_SMALL":
            raise CannotServe(f"{pair} are too short: RSA keys need 2048 bits") from error
        raise CannotServe(f"the private key {settings.tls_key} is no usable PEM key: {_reason(error)}") from error


@contextlib.contextmanager
def _path_of(content: bytes) -> Iterator[str]:
    """A path at which OpenSSL, which reads pairs from paths only, finds this content.

    The files that it came from may hold something else by now. Where the
    system can, it lies in memory: secrets are not to be written to a disk.
    """
    with os.fdopen(os.memfd_create("pem"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        yield f"/dev/fd/{file.fileno()}"


def _text(content: bytes) -> str:
    """What PEM is made of; tools write names in other letters above it."""
    return content.decode("ascii", "ignore")


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or error.strerror or str(error)).lower().replace("_", " ")
