"""TLS with real handshakes: what is refused at the start, who gets in, and files that change while the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import logging
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.mnist.v1 import digit_classifier_pb2 as pb
from protos.mnist.v1 import digit_classifier_pb2_grpc as pb_grpc
from server.app import build_server
from server.credentials import server_credentials
from server.errors import CannotServe
from server.limits import HANDSHAKE_SECONDS
from server.secret_files import MAX_BYTES
from server.settings import Settings
from tests.server.attacks import call_a_path_that_is_no_text

Start = Callable[..., tuple[str, subprocess.Popen[str]]]
Key: TypeAlias = "ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey"

TIMEOUT = 30
NOW = datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True)
class Pair:
    """Two PEM files, and the number by which the certificate is known."""

    cert: Path
    key: Path
    serial: int

    def settings(self, **others: Any) -> Settings:
        return Settings(port=0, tls_cert=str(self.cert), tls_key=str(self.key), **others)

    def flags(self) -> tuple[str, ...]:
        return ("--tls-cert", str(self.cert), "--tls-key", str(self.key), "--workers", "1")


class Authority:
    """Signs certificates for localhost."""

    def __init__(self, name: str) -> None:
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = self._sign(self._name, self._key.public_key(), is_authority=True)
        self.pem = self._certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, folder: Path, *, key: Key | None = None, password: bytes | None = None) -> Pair:
        key = key or ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(x509.Name([]), key.public_key(), is_authority=False)
        folder.mkdir(exist_ok=True)
        pair = Pair(folder / "server.pem", folder / "server.key", certificate.serial_number)
        pair.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + self.pem)
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption(),
            )
        )
        pair.key.chmod(0o600)
        return pair

    def _sign(self, subject: x509.Name, public_key: Any, *, is_authority: bool) -> x509.Certificate:
        addresses = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - datetime.timedelta(hours=1))
            .not_valid_after(NOW + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName(addresses), critical=not is_authority)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("ours")


@pytest.fixture(scope="module")
def stranger() -> Authority:
    return Authority("another")


@asynccontextmanager
async def server_of(settings: Settings) -> AsyncIterator[str]:
    """Without a model: health says so, which is answer enough here."""
    digit_server, port = build_server(settings)
    await digit_server.start()
    try:
        yield f"localhost:{port}"
    finally:
        await digit_server.stop(grace=0)


def channel_to(address: str, trusted: Authority, client: Pair | None = None) -> grpc.aio.Channel:
    """A channel with a connection of its own."""
    credentials = (
        grpc.ssl_channel_credentials(trusted.pem)
        if client is None
        else grpc.ssl_channel_credentials(trusted.pem, client.key.read_bytes(), client.cert.read_bytes())
    )
    address = address.replace("127.0.0.1", "localhost")
    return grpc.aio.secure_channel(address, credentials, [("grpc.use_local_subchannel_pool", 1)])


async def ask(channel: grpc.aio.Channel) -> int:
    """What health says, NOT_SERVING here."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    status: int = (await stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)).status
    return status


async def check_let_in(address: str, trusted: Authority, client: Pair | None = None) -> None:
    async with channel_to(address, trusted, client) as channel:
        await ask(channel)


async def check_kept_out(address: str, trusted: Authority, client: Pair | None = None) -> None:
    async with channel_to(address, trusted, client) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ask(channel)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE


def serial_at(address: str) -> int:
    """The number of the certificate that a new connection is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, port = address.rsplit(":", 1)
    with (
        socket.create_connection((host, int(port)), timeout=TIMEOUT) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        certificate = connection.getpeercert(binary_form=True)
    assert certificate is not None
    return x509.load_der_x509_certificate(certificate).serial_number


# At the start --------------------------------------------------------------------------


def test_without_a_certificate_there_is_no_tls() -> None:
    assert server_credentials(Settings()) is None


def break_pair(pair: Pair, how: str, authority: Authority, tmp_path: Path) -> None:
    """Make a pair unusable in one way."""
    match how:
        case "no certificate":
            pair.cert.unlink()
        case "no key":
            pair.key.unlink()
        case "a folder":
            pair.key.unlink()
            pair.key.mkdir()
        case "a pipe":
            pair.key.unlink()
            os.mkfifo(pair.key)
        case "an endless file":
            pair.key.unlink()
            pair.key.symlink_to("/dev/zero")
        case "a long file":
            pair.cert.write_bytes(bytes(MAX_BYTES + 1))
        case "an empty certificate":
            pair.cert.write_bytes(b"")
        case "text for a certificate":
            pair.cert.write_text("Dear server,\nplease trust us: 7 \u00fc\n", encoding="utf-8")
        case "half a certificate":
            pair.cert.write_bytes(pair.cert.read_bytes()[:200])
        case "text for a key":
            pair.key.write_bytes(b"\xff\xfe no key \0\n")
        case "half a key":
            pair.key.write_bytes(pair.key.read_bytes()[:100])
        case "exchanged":
            cert, key = pair.cert.read_bytes(), pair.key.read_bytes()
            pair.cert.write_bytes(key)
            pair.key.write_bytes(cert)
        case "another's key":
            pair.key.write_bytes(authority.issue(tmp_path / "other").key.read_bytes())
        case "another's key of another kind":
            other = authority.issue(
                tmp_path / "other", key=rsa.generate_private_key(public_exponent=65537, key_size=2048)
            )
            pair.key.write_bytes(other.key.read_bytes())
        case "an encrypted key":
            authority.issue(pair.key.parent, password=b"secret")
        case "a short key":
            authority.issue(pair.key.parent, key=rsa.generate_private_key(public_exponent=65537, key_size=1024))
        case "Ed25519":
            authority.issue(pair.key.parent, key=ed25519.Ed25519PrivateKey.generate())
        case "Ed448":
            authority.issue(pair.key.parent, key=ed448.Ed448PrivateKey.generate())
        case "P-521":
            authority.issue(pair.key.parent, key=ec.generate_private_key(ec.SECP521R1()))
        case _:
            raise ValueError(how)


BROKEN = {
    "no certificate": ["server.pem", "cannot be read", "No such file"],
    "no key": ["server.key", "cannot be read", "No such file"],
    "a folder": ["server.key", "no regular file"],
    "a pipe": ["server.key", "no regular file"],
    "an endless file": ["server.key", "no regular file"],
    "a long file": ["server.pem", "longer than 1048576 bytes"],
    "an empty certificate": ["server.pem", "holds no usable PEM certificates"],
    "text for a certificate": ["server.pem", "holds no usable PEM certificates"],
    "half a certificate": ["server.pem", "holds no usable PEM certificates"],
    "text for a key": ["server.key", "is no usable PEM key"],
    "half a key": ["server.key", "is no usable PEM key"],
    "exchanged": ["server.pem", "holds no usable PEM certificates"],
    "another's key": ["server.key", "server.pem", "do not match"],
    "another's key of another kind": ["server.key", "server.pem", "do not match"],
    "an encrypted key": ["server.key", "is encrypted"],
    "a short key": ["server.pem", "2048 bits"],
    "Ed25519": ["server.pem", "Ed25519", "gRPC serves RSA, P-256 and P-384"],
    "Ed448": ["server.pem", "Ed448", "gRPC serves RSA, P-256 and P-384"],
    "P-521": ["server.pem", "P-521", "gRPC serves RSA, P-256 and P-384"],
}


@pytest.mark.parametrize("how", list(BROKEN))
def test_a_pair_that_cannot_be_used_stops_the_start_and_the_sentence_names_it(
    how: str, authority: Authority, tmp_path: Path
) -> None:
    pair = authority.issue(tmp_path / "tls")
    break_pair(pair, how, authority, tmp_path)
    with pytest.raises(CannotServe) as error:
        server_credentials(pair.settings())
    for word in BROKEN[how]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_client_ca_without_certificates_stops_the_start(authority: Authority, tmp_path: Path) -> None:
    pair = authority.issue(tmp_path / "tls")
    with pytest.raises(CannotServe, match=r"client CA file .*server\.key holds no usable PEM certificates"):
        server_credentials(pair.settings(tls_client_ca=str(pair.key)))


def test_the_process_ends_with_one_line_when_key_and_certificate_do_not_match(
    server_process: Start, authority: Authority, tmp_path: Path
) -> None:
    pair = authority.issue(tmp_path / "tls")
    break_pair(pair, "another's key", authority, tmp_path)
    _, process = server_process(*pair.flags(), wait=False)
    out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out) == (1, "")
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("mnist-grpc-server: ")
    assert "do not match" in err.strip().splitlines()[-1]


# Who gets in --------------------------------------------------------------------------------


KEYS: dict[str, Callable[[], Key]] = {
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "RSA 2048": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
}


@pytest.mark.parametrize("kind", list(KEYS))
async def test_a_client_that_trusts_the_authority_is_served_with_each_kind_of_key(
    kind: str, authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    async with server_of(authority.issue(tmp_path / "tls", key=KEYS[kind]()).settings()) as address:
        await check_let_in(address, authority)
        await check_kept_out(address, stranger)  # it does not trust us


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not here")
async def test_the_certificates_that_the_manual_has_made_are_served(tmp_path: Path) -> None:
    manual = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    (commands,) = [block for block in re.findall(r"```sh\n(.*?)```", manual, re.DOTALL) if "-keyout ca.key" in block]
    await asyncio.to_thread(subprocess.run, ["sh", "-euc", commands], cwd=tmp_path, check=True, capture_output=True)
    settings = Settings(port=0, tls_cert=str(tmp_path / "server.pem"), tls_key=str(tmp_path / "server.key"))
    trust = grpc.ssl_channel_credentials((tmp_path / "ca.pem").read_bytes())
    async with server_of(settings) as address, grpc.aio.secure_channel(address, trust) as channel:
        await ask(channel)


async def test_certificate_and_key_may_share_a_file_that_begins_with_text(authority: Authority, tmp_path: Path) -> None:
    pair = authority.issue(tmp_path / "tls")
    pair.cert.write_bytes("subject=M\u00fcnchen\n".encode() + pair.cert.read_bytes() + pair.key.read_bytes())
    async with server_of(Pair(pair.cert, pair.cert, pair.serial).settings()) as address:
        await check_let_in(address, authority)


async def test_a_plaintext_client_gets_nothing_from_a_tls_port(authority: Authority, tmp_path: Path) -> None:
    async with (
        server_of(authority.issue(tmp_path / "tls").settings()) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ask(channel)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_a_client_of_an_outdated_tls_version_is_refused(authority: Authority, tmp_path: Path) -> None:
    def shake_hands(address: str, version: ssl.TLSVersion) -> str | None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        context.set_ciphers("ALL:@SECLEVEL=0")  # else OpenSSL would refuse for us
        context.minimum_version = context.maximum_version = version
        host, port = address.rsplit(":", 1)
        with (
            socket.create_connection((host, int(port)), timeout=TIMEOUT) as plain,
            context.wrap_socket(plain) as connection,
        ):
            return connection.version()

    async with server_of(authority.issue(tmp_path / "tls").settings()) as address:
        for outdated in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
            with pytest.raises(ssl.SSLError):
                await asyncio.to_thread(shake_hands, address, outdated)
        assert await asyncio.to_thread(shake_hands, address, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"


async def test_with_a_client_ca_only_its_certificates_are_let_in(
    authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    clients = Authority("of the clients")
    client_ca = tmp_path / "clients.pem"
    client_ca.write_bytes(clients.pem)
    pair = authority.issue(tmp_path / "tls")
    async with server_of(pair.settings(tls_client_ca=str(client_ca))) as address:
        await check_let_in(address, authority, clients.issue(tmp_path / "client"))
        await check_kept_out(address, authority)
        await check_kept_out(address, authority, stranger.issue(tmp_path / "stranger"))
        await check_kept_out(address, authority, authority.issue(tmp_path / "peer"))


# Files that change ----------------------------------------------------------------------------


def publish(folder: Path, link: Path) -> None:
    """Let a link lead to another folder, as Kubernetes renews a mounted secret."""
    new = link.with_name("new")
    new.symlink_to(folder, target_is_directory=True)
    os.replace(new, link)


@pytest.mark.parametrize("how", ["written over", "renamed", "linked"])
async def test_a_new_certificate_is_served_without_a_restart_and_old_connections_go_on(
    how: str, server_process: Start, authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    first = authority.issue(tmp_path / "first")
    second = stranger.issue(tmp_path / "second")  # of another authority: who knows the first one cannot connect again
    link = tmp_path / "tls"
    if how == "linked":
        publish(tmp_path / "first", link)
    else:
        authority.issue(link)
        (link / "server.pem").write_bytes(first.cert.read_bytes())
        (link / "server.key").write_bytes(first.key.read_bytes())
    served = Pair(link / "server.pem", link / "server.key", first.serial)
    address, process = server_process(*served.flags())
    async with channel_to(address, authority) as old:
        await ask(old)
        assert serial_at(address) == first.serial
        if how == "linked":
            publish(tmp_path / "second", link)
        elif how == "renamed":
            os.replace(second.key, served.key)
            os.replace(second.cert, served.cert)
        else:
            served.key.write_bytes(second.key.read_bytes())
            served.cert.write_bytes(second.cert.read_bytes())
        assert serial_at(address) == second.serial
        await ask(old)
        await check_let_in(address, stranger)
        await check_kept_out(address, authority)
        classifier: Any = pb_grpc.DigitClassifierStub(old)
        answer = await classifier.Classify(pb.ClassifyRequest(pixels=bytes(784)), timeout=TIMEOUT)
        assert len(answer.digits) == 1
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert "ERROR" not in err


async def test_each_address_of_a_host_serves_the_pair_and_a_new_one(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `localhost` has two, where there is IPv6."""
    monkeypatch.setattr("server.app.literal_hosts", lambda host: ["127.0.0.1", "127.0.0.2"])
    pair = authority.issue(tmp_path / "tls")
    async with server_of(pair.settings()) as address:
        hosts = [f"{host}:{address.rpartition(':')[2]}" for host in ("127.0.0.1", "127.0.0.2")]
        assert [await asyncio.to_thread(serial_at, host) for host in hosts] == [pair.serial] * 2
        new = authority.issue(tmp_path / "tls")
        assert [await asyncio.to_thread(serial_at, host) for host in hosts * 2] == [new.serial] * 4


async def test_a_server_in_the_place_of_one_that_a_caller_ended_serves_the_last_good_pair(
    authority: Authority, tmp_path: Path
) -> None:
    untrusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    untrusting.check_hostname, untrusting.verify_mode = False, ssl.CERT_NONE
    untrusting.set_alpn_protocols(["h2"])
    pair = authority.issue(tmp_path / "tls")
    settings = pair.settings()

    async def end(address: str) -> None:
        await call_a_path_that_is_no_text(address, transport=settings.transport, context=untrusting)

    async with server_of(settings) as address:
        new = authority.issue(tmp_path / "tls")
        assert await asyncio.to_thread(serial_at, address) == new.serial
        good = pair.cert.read_bytes()
        pair.cert.write_bytes(good[:100])
        await end(address)
        assert await asyncio.to_thread(serial_at, address) == new.serial
        await check_let_in(address, authority)
        newest = authority.issue(tmp_path / "tls")
        await end(address)
        assert await asyncio.to_thread(serial_at, address) == newest.serial
        await check_let_in(address, authority)


@pytest.mark.parametrize(
    "how", ["another's key", "no certificate", "no key", "half a key", "text for a certificate", "a pipe", "Ed25519"]
)
async def test_a_broken_new_pair_keeps_the_old_one_serving_and_is_logged_once(
    how: str,
    authority: Authority,
    stranger: Authority,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pair = authority.issue(tmp_path / "tls")
    async with server_of(pair.settings()) as address:
        await check_let_in(address, authority)
        break_pair(pair, how, authority, tmp_path)
        for _ in range(3):
            assert await asyncio.to_thread(serial_at, address) == pair.serial
        (entry,) = [entry for entry in caplog.records if entry.levelno >= logging.WARNING]
        assert entry.levelname == "ERROR"
        for word in (*BROKEN[how], "what was read before stays in use"):
            assert word in entry.message
        if how in ("a pipe", "a folder"):
            pair.key.unlink()
        whole = stranger.issue(tmp_path / "tls")
        assert await asyncio.to_thread(serial_at, address) == whole.serial
        break_pair(whole, how, authority, tmp_path)
        assert await asyncio.to_thread(serial_at, address) == whole.serial
        assert len([entry for entry in caplog.records if entry.levelno >= logging.WARNING]) == 2, "broken once more"


async def test_a_half_replaced_pair_is_served_when_its_other_half_comes(
    server_process: Start, authority: Authority, tmp_path: Path
) -> None:
    old, new = authority.issue(tmp_path / "tls"), authority.issue(tmp_path / "new")
    address, process = server_process(*old.flags())
    os.replace(new.cert, old.cert)
    for _ in range(3):
        assert serial_at(address) == old.serial
    os.replace(new.key, old.key)
    assert serial_at(address) == new.serial
    await check_let_in(address, authority)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert err.count("do not match; what was read before stays in use") == 1


async def test_a_new_client_ca_decides_who_is_let_in_from_then_on(
    authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    client_ca = tmp_path / "clients.pem"
    client_ca.write_bytes(authority.pem)
    first, second = authority.issue(tmp_path / "client"), stranger.issue(tmp_path / "stranger")
    pair = authority.issue(tmp_path / "tls")
    async with server_of(pair.settings(tls_client_ca=str(client_ca))) as address:
        await check_let_in(address, authority, first)
        await check_kept_out(address, authority, second)
        client_ca.write_bytes(stranger.pem)
        await check_let_in(address, authority, second)
        await check_kept_out(address, authority, first)
        client_ca.write_bytes(b"")
        await check_let_in(address, authority, second)  # rather than nobody, or everybody
        await check_kept_out(address, authority)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_session_is_no_way_around_a_new_client_ca(
    version: ssl.TLSVersion, authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    """A client that resumes a session shows no certificate again."""
    client_ca = tmp_path / "clients.pem"
    client_ca.write_bytes(authority.pem)
    pair, first = authority.issue(tmp_path / "tls"), authority.issue(tmp_path / "client")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = version
    context.load_verify_locations(cadata=authority.pem.decode())
    context.load_cert_chain(first.cert, first.key)
    context.set_alpn_protocols(["h2"])

    def connect(address: str, session: ssl.SSLSession | None = None) -> ssl.SSLSession | None:
        """The session of a new connection on which the server says something, or OSError."""
        host, port = address.rsplit(":", 1)
        with (
            socket.create_connection((host, int(port)), timeout=TIMEOUT) as plain,
            context.wrap_socket(plain, server_hostname="localhost", session=session) as connection,
        ):
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
            if not connection.recv(100):
                raise ConnectionError("closed")
            return connection.session

    async with server_of(pair.settings(tls_client_ca=str(client_ca))) as address:
        session = await asyncio.to_thread(connect, address)
        client_ca.write_bytes(stranger.pem)
        for old in (None, session):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.to_thread(connect, address, old)


async def test_handshakes_while_the_pair_changes_all_succeed_with_one_of_the_two(
    authority: Authority, tmp_path: Path
) -> None:
    pair, other = authority.issue(tmp_path / "tls"), authority.issue(tmp_path / "other")
    contents = [(each.cert.read_bytes(), each.key.read_bytes()) for each in (pair, other)]
    async with server_of(pair.settings()) as address:
        done = asyncio.Event()

        def exchange(number: int) -> None:
            cert, key = contents[number % 2]
            for path, content in ((pair.cert, cert), (pair.key, key)):
                path.write_bytes(content)  # not at once: a reader may find it empty, or half of it

        async def keep_exchanging() -> None:
            number = 1
            while not done.is_set():
                await asyncio.to_thread(exchange, number)
                number += 1

        changing = asyncio.create_task(keep_exchanging())
        seen = [await asyncio.to_thread(serial_at, address) for _ in range(200)]
        done.set()
        await changing
        assert set(seen) <= {pair.serial, other.serial}
        for number, served in ((1, other), (0, pair)):
            exchange(number)
            assert await asyncio.to_thread(serial_at, address) == served.serial


async def test_a_pair_that_is_written_over_while_it_is_checked_is_served_all_the_same(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, other = authority.issue(tmp_path / "tls"), authority.issue(tmp_path / "other")
    new = [(pair.cert, other.cert.read_bytes()), (pair.key, other.key.read_bytes())]
    load = ssl.SSLContext.load_cert_chain

    def write(content: bytes | None = None) -> None:
        for path, new_content in new:
            path.write_bytes(new_content if content is None else content)

    def load_while_files_change(context: ssl.SSLContext, *arguments: Any) -> None:
        write(b"half of it")
        load(context, *arguments)

    async with server_of(pair.settings()) as address:
        write()
        with monkeypatch.context() as patched:
            patched.setattr(ssl.SSLContext, "load_cert_chain", load_while_files_change)
            await asyncio.to_thread(serial_at, address)
        write()  # what has been seen once, and must not count as refused
        assert await asyncio.to_thread(serial_at, address) == other.serial


async def test_handshakes_that_fail_do_not_write_the_log(
    server_process: Start, authority: Authority, tmp_path: Path
) -> None:
    """It is for whoever runs the server, not for whoever finds its port."""
    address, process = server_process(*authority.issue(tmp_path / "tls").flags())
    host, port = address.rsplit(":", 1)
    for words in (b"GET / HTTP/1.1\r\n\r\n" * 5, b"\x16\x03\x01" + b"x" * 500) * 5:
        with socket.create_connection((host, int(port)), timeout=TIMEOUT) as connection:
            connection.sendall(words)
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(65536):
                    pass
    await check_let_in(address, authority)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=TIMEOUT)
    assert "Handshake failed" not in err


# Handshakes that never end ------------------------------------------------------------------------


async def test_a_tls_handshake_that_never_ends_is_given_up(
    server_process: Start, authority: Authority, tmp_path: Path
) -> None:
    address, _ = server_process(*authority.issue(tmp_path / "tls").flags())
    host, port = address.rsplit(":", 1)

    def wait_for_the_end(first: bytes) -> bytes:
        with socket.create_connection((host, int(port)), timeout=HANDSHAKE_SECONDS + TIMEOUT) as connection:
            connection.sendall(first)
            return connection.recv(1)

    # Nothing at all, and the beginning of a record that announces 512 bytes.
    ends = await asyncio.gather(
        *(asyncio.to_thread(wait_for_the_end, first) for first in (b"", b"\x16\x03\x01\x02\x00"))
    )
    assert ends == [b"", b""], "closed, without a word"
    await check_let_in(address, authority)
