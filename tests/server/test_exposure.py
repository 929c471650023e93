"""What an operator is warned of: addresses that others can reach, secrets that others can read."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from server.exposure import exposure_warning, is_local, warnings
from server.settings import Settings

TLS = {"tls_cert": "server.pem", "tls_key": "server.key"}
TOKENS = {"auth_token_file": "tokens"}
CLIENT_CA = {**TLS, "tls_client_ca": "clients.pem"}


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.8.9.10",
        "::1",
        "[::1]",
        "::ffff:127.0.0.1",
        "localhost",
        "unix:/run/mnist.sock",
        "unix-abstract:mnist",
        "no.such.name.invalid",
    ],
)
def test_an_address_of_this_machine_alone_needs_no_warning(host: str) -> None:
    assert is_local(host)
    assert exposure_warning(Settings(host=host)) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1", "fe80::1%lo"])
def test_an_address_that_others_can_reach_is_warned_of(host: str) -> None:
    assert not is_local(host)
    warning = exposure_warning(Settings(host=host, port=50051))
    assert warning is not None
    assert "port 50051" in warning
    assert host in warning


def test_a_name_is_what_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "gateway": ["127.0.0.1", "192.0.2.1"],
        "inside": ["127.0.0.2", "::1"],
    }

    def resolve(name: str, *_: object) -> list[tuple[object, ...]]:
        return [(0, 0, 0, "", (address, 0)) for address in names[name]]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert not is_local("gateway")
    assert is_local("inside")


@pytest.mark.parametrize(
    ("given", "risk", "remedy"),
    [
        ({}, "can use the model, and read and change what others send", "--auth-token-file"),
        ({"admin": True}, "can use the model and exchange it", "--tls-cert"),
        (TOKENS, "without TLS: whoever is on the way can read and change what is sent, the tokens", "--tls-key"),
        (TLS, "without tokens and without client certificates: whoever reaches it can use", "--tls-client-ca"),
    ],
)
def test_the_warning_names_the_risk_that_is_left_and_what_would_close_it(
    given: dict[str, str], risk: str, remedy: str
) -> None:
    warning = exposure_warning(Settings(host="0.0.0.0", **given))  # type: ignore[arg-type]
    assert warning is not None
    assert risk in warning
    assert remedy in warning.split(";")[1]


@pytest.mark.parametrize("given", [{**TLS, **TOKENS}, CLIENT_CA, {**CLIENT_CA, **TOKENS}])
def test_with_tls_and_callers_who_are_known_there_is_nothing_to_warn_of(given: dict[str, str]) -> None:
    assert exposure_warning(Settings(host="0.0.0.0", **given)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("mode", "warned"), [(0o600, 0), (0o640, 0), (0o644, 2), (0o604, 2)])
def test_secrets_that_every_user_can_read_are_warned_of(mode: int, warned: int, tmp_path: Path) -> None:
    key, tokens = tmp_path / "server.key", tmp_path / "tokens"
    for path in (key, tokens):
        path.touch()
        path.chmod(mode)
    found = warnings(Settings(tls_cert="server.pem", tls_key=str(key), auth_token_file=str(tokens)))
    assert len(found) == warned
    for path, warning in zip((key, tokens), found, strict=False):
        assert str(path) in warning
        assert f"mode {mode:04o}" in warning


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_process_warns_once_and_serves(
    workers: str, server_process: Callable[..., tuple[str, subprocess.Popen[str]]], tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("right-0123456789abcdef", encoding="utf-8")
    tokens.chmod(0o644)
    _, process = server_process("--host", "0.0.0.0", "--auth-token-file", str(tokens), "--workers", workers)
    process.terminate()
    _, err = process.communicate(timeout=30)
    warned = [line for line in err.splitlines() if "WARNING" in line]
    assert [("can reach 0.0.0.0" in line, str(tokens) in line) for line in warned] == [(True, False), (False, True)]


def test_secrets_that_are_not_there_are_left_to_those_who_need_them() -> None:
    assert warnings(Settings(**TLS, **TOKENS)) == []  # type: ignore[arg-type]
