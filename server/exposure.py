"""What an operator is warned of at the start: who can reach the server, and who can read its secrets."""

from __future__ import annotations

import ipaddress
import socket

from server.secret_files import permission_warning
from server.settings import Settings


def warnings(settings: Settings) -> list[str]:
    """Sentences for the log; what they warn of does not keep the server from serving."""
    secrets = {settings.tls_key: "private key", settings.auth_token_file: "token file"}
    found = [exposure_warning(settings), *(permission_warning(path, what) for path, what in secrets.items() if path)]
    return [warning for warning in found if warning]


def exposure_warning(settings: Settings) -> str | None:
    """The risk of an address that other machines can reach, without encryption or without a secret of the callers."""
    if is_local(settings.host):
        return None
    callers_known = bool(settings.auth_token_file or settings.tls_client_ca)
    use = "use the model and exchange it" if settings.admin else "use the model"
    if not settings.tls_cert and not callers_known:
        risk = f"without TLS and without tokens: whoever reaches it can {use}, and read and change what others send"
        remedy = "--tls-cert, --tls-key and --auth-token-file (or --tls-client-ca)"
    elif not settings.tls_cert:
        risk = "without TLS: whoever is on the way can read and change what is sent, the tokens included"
        remedy = "--tls-cert and --tls-key"
    elif not callers_known:
        risk = f"without tokens and without client certificates: whoever reaches it can {use}"
        remedy = "--auth-token-file or --tls-client-ca"
    else:
        return None
    return f"other machines can reach {settings.host}, port {settings.port}, {risk}; {remedy} would close it"


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address: loopback, or a name of nothing else, or a Unix socket."""
    if host.startswith(("unix:", "unix-abstract:")):
        return True
    if not host:
        return False
    try:
        found = {str(address[0]) for *_, address in socket.getaddrinfo(host.strip("[]"), None)}
    except OSError:
        return True  # nobody can reach a name that means nothing; to bind it fails
    return all(_is_loopback(address) for address in found)


def _is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback
