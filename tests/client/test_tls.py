"""TLS, certificates of clients and tokens, against the real server; and what is said where two ends do not match."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import client
from tests.client.certificates import Authority, Pair
from tests.client.conftest import real_server

if TYPE_CHECKING:
    from tests.client.conftest import Connect, Fakes

GreyImage = npt.NDArray[np.uint8]
TOKENS = ("first-token-0123456789", "second-token-0123456789")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority("ours", tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority("another", tmp_path_factory.mktemp("another"))


@dataclass(frozen=True)
class Secured:
    """A real server that asks for a certificate and a token, and what lets a client in."""

    address: str
    tls: client.TLS
    ca: Path


@pytest.fixture(scope="module")
def secured(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    own, mine = authority.issue("127.0.0.1", "localhost"), authority.issue("a client")
    folder = tmp_path_factory.mktemp("server")
    tokens = folder / "tokens"
    tokens.write_text("\n".join(TOKENS))
    tokens.chmod(0o600)
    flags = ("--tls-cert", own.certificate, "--tls-key", own.key, "--tls-client-ca", authority.file)
    with real_server(folder, *flags, "--auth-token-file", tokens, "--workers", "1") as address:
        yield Secured(address, client.TLS(authority.file, mine.certificate, mine.key), authority.file)


def test_every_method_works_with_a_certificate_and_a_token(
    connect: Connect, secured: Secured, digits: list[GreyImage]
) -> None:
    twin = connect(secured.address, tls=secured.tls, token=TOKENS[0])
    twin.wait_ready()
    assert twin.is_serving()
    assert twin.get_model().name == "mnist"
    assert twin.classify(digits[7]).digit == 7
    assert [prediction.digit for prediction in twin.classify_batch(digits)] == [*range(10)] * 2
    assert [told.digit for told in twin.stream_classify(digits) if isinstance(told, client.Prediction)] == [
        *range(10)
    ] * 2


def test_certificates_may_be_given_as_bytes(connect: Connect, secured: Secured, digits: list[GreyImage]) -> None:
    def read(path: Any) -> bytes:
        return Path(path).read_bytes()

    tls = client.TLS(read(secured.tls.ca), read(secured.tls.certificate), read(secured.tls.key))
    assert connect(secured.address, tls=tls, token=TOKENS[1]).classify(digits[7]).digit == 7


def test_several_servers_and_connections_work_with_tls(
    connect: Connect, secured: Secured, digits: list[GreyImage]
) -> None:
    host, port = secured.address.split(":")
    twin = connect([secured.address, f"localhost:{port}"], tls=secured.tls, token=TOKENS[0], connections=2)
    assert [twin.classify(digits[7]).digit for _ in range(8)] == [7] * 8
    assert host == "127.0.0.1"


def test_a_client_without_the_certificate_that_is_asked_for_is_told_so(
    connect: Connect, secured: Secured, digits: list[GreyImage]
) -> None:
    with pytest.raises(client.UnavailableError, match=r"wants certificates.*certificate=…, key=…"):
        connect(secured.address, tls=client.TLS(secured.ca), token=TOKENS[0]).classify(digits[7])


@pytest.mark.parametrize("method", ["classify", "classify_batch", "stream_classify"])
@pytest.mark.parametrize("token", [None, "another-token-0123456789"])
def test_a_token_that_the_server_does_not_know_is_told_and_not_shown(
    connect: Connect, secured: Secured, digits: list[GreyImage], token: str | None, method: str
) -> None:
    twin = connect(secured.address, tls=secured.tls, token=token)
    calls: dict[str, Callable[[], Any]] = {
        "classify": lambda: twin.classify(digits[7]),
        "classify_batch": lambda: twin.classify_batch(digits),
        "stream_classify": lambda: list(twin.stream_classify(digits)),
    }
    with pytest.raises(client.UnauthenticatedError, match=r"valid token is needed.*token=…") as caught:
        calls[method]()
    assert "another-token" not in str(caught.value) + repr(caught.value) + repr(twin)


def test_a_token_is_asked_for_at_every_call(connect: Connect, secured: Secured, digits: list[GreyImage]) -> None:
    tokens = [TOKENS[0], "withdrawn-token-0123456789", TOKENS[1] + "\n"]
    twin = connect(secured.address, tls=secured.tls, token=lambda: tokens.pop(0))
    assert twin.classify(digits[7]).digit == 7
    with pytest.raises(client.UnauthenticatedError):
        twin.classify(digits[7])
    assert twin.classify(digits[7]).digit == 7
    assert tokens == []


def test_what_the_function_of_a_token_raises_is_raised(
    connect: Connect, secured: Secured, digits: list[GreyImage]
) -> None:
    def fails() -> str:
        raise KeyError("the vault is locked")

    with pytest.raises(KeyError, match="vault"):
        connect(secured.address, tls=secured.tls, token=fails).classify(digits[7])
    with pytest.raises(ValueError, match="token is printable") as caught:
        connect(secured.address, tls=secured.tls, token=lambda: "two\nlines").classify(digits[7])
    assert "lines" not in str(caught.value)


# Ends that do not match -----------------------------------------------------------


def served_with(pair: Pair) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials([(pair.key.read_bytes(), pair.certificate.read_bytes())])


def test_a_client_in_plaintext_is_told_that_the_server_may_want_tls(
    connect: Connect, fakes: Fakes, authority: Authority, digits: list[GreyImage]
) -> None:
    address = fakes.serve(credentials=served_with(authority.issue("127.0.0.1")))
    with pytest.raises(client.UnavailableError, match=rf"^{address}: .*tls=True"):
        connect(address).classify(digits[7])


def test_a_client_with_tls_is_told_that_the_server_has_none(
    connect: Connect, fakes: Fakes, authority: Authority, digits: list[GreyImage]
) -> None:
    address = fakes.serve()
    with pytest.raises(client.UnavailableError, match=rf"^{address}: .*speaks no TLS; leave tls out"):
        connect(address, tls=client.TLS(authority.file)).classify(digits[7])


@pytest.mark.parametrize("tls", ["the authorities of gRPC", "another authority"])
def test_a_certificate_of_an_unknown_authority_is_told(
    connect: Connect, fakes: Fakes, authority: Authority, stranger: Authority, digits: list[GreyImage], tls: str
) -> None:
    address = fakes.serve(credentials=served_with(authority.issue("127.0.0.1")))
    with pytest.raises(client.UnavailableError, match=rf"^{address}: .*authority.*client\.TLS\(ca="):
        connect(address, tls=client.TLS(stranger.file) if tls == "another authority" else True).classify(digits[7])


def test_a_certificate_of_another_name_is_told_and_the_name_may_be_given(
    connect: Connect, fakes: Fakes, authority: Authority, digits: list[GreyImage]
) -> None:
    address = fakes.serve(credentials=served_with(authority.issue("digits.example")))
    with pytest.raises(client.UnavailableError, match=rf"^{address}: .*another name.*server_name"):
        connect(address, tls=client.TLS(authority.file)).classify(digits[7])
    tls = client.TLS(authority.file, server_name="digits.example")
    assert connect(address, tls=tls).classify(digits[7]).digit == 7


def test_servers_of_one_name_are_balanced_by_their_addresses(
    connect: Connect, fakes: Fakes, authority: Authority, digits: list[GreyImage]
) -> None:
    credentials = served_with(authority.issue("digits.example"))
    addresses = [fakes.serve(credentials=credentials), fakes.nobody(), fakes.serve(credentials=credentials)]
    twin = connect(addresses, tls=client.TLS(authority.file, server_name="digits.example"))
    assert [twin.classify(digits[7]).digit for _ in range(10)] == [7] * 10


# Arguments ------------------------------------------------------------------------


def test_a_certificate_and_its_key_belong_together(authority: Authority) -> None:
    with pytest.raises(ValueError, match="given together"):
        client.TLS(certificate=authority.file)
    with pytest.raises(ValueError, match="given together"):
        client.TLS(key=authority.file)


@pytest.mark.parametrize("kind", [client.Client, client.AsyncClient])
def test_files_that_cannot_be_used_are_told_when_the_client_is_made(
    kind: Callable[..., Any], authority: Authority, tmp_path: Path
) -> None:
    nothing, text = tmp_path / "nothing.pem", tmp_path / "text.pem"
    text.write_text("no certificate")
    pair = authority.issue("somebody")
    with pytest.raises(ValueError, match=r"ca=.*nothing\.pem.*No such file"):
        kind("there:1", tls=client.TLS(nothing))
    with pytest.raises(ValueError, match=r"ca=.*no PEM of a certificate in .*text\.pem"):
        kind("there:1", tls=client.TLS(text))
    with pytest.raises(ValueError, match=r"key=.*no PEM of a private key in the bytes given"):
        kind("there:1", tls=client.TLS(certificate=pair.certificate, key=pair.certificate.read_bytes()))
    with pytest.raises(ValueError, match=r"certificate=.*no PEM of a certificate"):
        kind("there:1", tls=client.TLS(certificate=pair.key, key=pair.key))


def test_a_key_is_not_shown(authority: Authority) -> None:
    pair = authority.issue("somebody")
    shown = repr(client.TLS(certificate=pair.certificate, key=pair.key.read_bytes()))
    assert "PRIVATE" not in shown


@pytest.mark.parametrize("wrong", ["yes", 1, {"ca": "ca.pem"}])
def test_tls_is_yes_no_or_a_tls(wrong: Any) -> None:
    with pytest.raises(TypeError, match="tls is True, False or client"):
        client.Client("there:1", tls=wrong)


@pytest.mark.parametrize("wrong", [1, ["ca.pem"]])
def test_a_certificate_is_a_path_or_bytes(wrong: Any) -> None:
    with pytest.raises(TypeError, match="a path or the bytes of PEM"):
        client.TLS(ca=wrong)


def test_pem_that_is_text_is_no_path(authority: Authority) -> None:
    with pytest.raises(ValueError, match="encode"):
        client.TLS(ca=authority.pem.decode())


# The command line -----------------------------------------------------------------


def mnist_grpc(*arguments: str | Path, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python -m client`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MNIST_GRPC_")}
    process = subprocess.run(
        [sys.executable, "-m", "client", *map(str, arguments)],
        cwd=Path(client.__file__).parents[1],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return process.returncode, process.stdout, process.stderr


@pytest.fixture
def picture(digits: list[GreyImage], tmp_path: Path) -> Path:
    path = tmp_path / "seven.png"
    Image.fromarray(digits[7]).save(path)
    return path


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# of the client\n\n{TOKENS[0]}\n{TOKENS[1]}\n")
    return path


def test_the_command_line_speaks_tls_with_a_token(secured: Secured, picture: Path, token_file: Path) -> None:
    certificates = ("--ca", secured.ca, "--cert", str(secured.tls.certificate), "--key", str(secured.tls.key))
    at = ("--target", secured.address, *certificates)
    assert mnist_grpc("health", *at) == (0, f"{secured.address}: serving\n", "")
    code, out, err = mnist_grpc("classify", picture, *at, "--token-file", token_file)
    assert (code, out.split()[1], err) == (0, "7", "")
    code, out, err = mnist_grpc("classify", picture, *at)
    assert (code, out) == (1, "")
    assert "valid token is needed" in err


def test_the_command_line_takes_files_from_the_environment(secured: Secured, picture: Path, token_file: Path) -> None:
    code, out, err = mnist_grpc(
        "classify",
        picture,
        MNIST_GRPC_TARGET=secured.address,
        MNIST_GRPC_CA=str(secured.ca),
        MNIST_GRPC_CERT=str(secured.tls.certificate),
        MNIST_GRPC_KEY=str(secured.tls.key),
        MNIST_GRPC_TOKEN_FILE=str(token_file),
    )
    assert (code, out.split()[1], err) == (0, "7", "")


def test_the_command_line_takes_another_name_of_the_server(fakes: Fakes, authority: Authority, picture: Path) -> None:
    address = fakes.serve(credentials=served_with(authority.issue("digits.example")))
    code, out, err = mnist_grpc(
        "classify", picture, "--target", address, "--ca", authority.file, "--server-name", "digits.example"
    )
    assert (code, out.split()[1], err) == (0, "7", "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--ca", "nothing.pem"), "nothing.pem"),
        (("--cert", "me.pem"), "given together"),
        (("--token-file", "nothing"), "the token file nothing: No such file"),
        (("--target", "http://localhost:1"), "not a URL"),
    ],
)
def test_the_command_line_says_what_is_wrong_before_anything_is_done(arguments: tuple[str, ...], sentence: str) -> None:
    code, out, err = mnist_grpc("health", *arguments)
    assert (code, out) == (2, "")
    assert sentence in err.splitlines()[-1]


def test_the_command_line_sends_no_token_in_plaintext_to_another_machine(token_file: Path) -> None:
    code, _, err = mnist_grpc("health", "--target", "digits.example", "--token-file", token_file)
    assert code == 2
    assert "not sent in plaintext" in err
    assert TOKENS[0] not in err
