"""`mnist-grpc bench`: what people and programs see of it."""

from __future__ import annotations

import argparse
import itertools
import json
import ssl
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from client._channel import DEFAULT_TARGET, TARGET_VARIABLE, TLS
from client._errors import ServerError
from client._sync import Client

if TYPE_CHECKING:
    from client.load.measure import Door, Load

KINDS = ("classify", "stream", "infer")
CAPACITY_CALLERS = 64

DESCRIPTION = """\
Send images to a running server and measure how fast it answers. Every answer
is checked: first the server is asked for each of 256 images alone, and has to
read them right; whatever it answers under load has to be the same. A wrong
answer, an error or a lost one fails the run, and so do messages that could not
be sent, and a connection that the server leaves or allows fewer callers.

Closed loop (--callers): so many messages are unanswered at any time. Open loop
(--rate): messages are meant to be sent at times that were set beforehand, and
latency counts from those, so that a pause of the server is in all that were
meant to be sent during it.

Beside each figure stands what the generator itself can do at a server that
computes nothing, on this machine at this time. Run it on another machine than
the server's, or give each cores of its own: else they share them.

Several numbers with commas between make a run of each."""


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `bench` to the sub-commands of `mnist-grpc`."""
    parser = commands.add_parser(
        "bench",
        parents=[common],
        help="measure how fast a server answers",
        description=DESCRIPTION,
        epilog="Needs pip install 'mnist-grpc[bench]'.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default="classify",
        help="calls of Classify, messages of one stream, or calls of the Open Inference Protocol (default: classify)",
    )
    parser.add_argument("--images", type=_counts, default=[1], metavar="N,...", help="in each message (default: 1)")
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument("--callers", type=_counts, metavar="N,...", help="closed loop (default: 1,64)")
    loop.add_argument(
        "--rate",
        type=_rates,
        metavar="R,...",
        help=f"open loop: messages a second; or 70%% of what {CAPACITY_CALLERS} callers get, which is measured before",
    )
    parser.add_argument("--even", action="store_true", help="only with --rate: evenly, and not at random (Poisson)")
    parser.add_argument("--connections", type=_count, default=0, metavar="N", help="(default: 4, for a stream 1)")
    parser.add_argument("--seconds", type=_positive, default=5.0, help="of each run (default: 5)")
    parser.add_argument("--warm-up", type=_positive, default=1.0, help="seconds before, not measured (default: 1)")
    parser.add_argument("--no-ceiling", action="store_true", help="do not measure the generator itself")
    parser.add_argument("--plot", metavar="FILE", help="also draw latencies and throughput, to this file (.png, ...)")
    parser.set_defaults(run=run)


def run(client: Client, options: argparse.Namespace) -> int:
    """Measure and print; return 0, 1 if any answer was not right, or 2 for what cannot be measured."""
    try:
        if options.even and not options.rate:
            raise ValueError("--even is for --rate")
        door = _door(client, options)
        from client.load.ceiling import ceiling, responder
        from client.load.measure import LoadFailed, measure
        from client.load.plot import check_plot, draw
        from client.load.report import HEAD, line, remarks

        if options.plot:
            check_plot(options.plot)
    except (ValueError, OSError) as error:
        print(f"mnist-grpc bench: {error}", file=sys.stderr)
        return 2
    digits = known_digits(client)
    if not options.json:
        print(f"{door.target}; every answer is checked\n\n{HEAD}")
    runs: list[dict[str, Any]] = []

    def measured(load: Load) -> dict[str, Any]:
        found: dict[str, Any] = {"name": load.name, **measure(door, load, digits)}
        runs.append(found)
        try:
            if not options.no_ceiling:
                with responder() as own:
                    found["ceiling"] = ceiling(own, load)
        finally:
            print(json.dumps({"target": door.target, **found}) if options.json else line(found), flush=True)
        return found

    code = 0
    try:
        for load in _loads(options):
            if load.rate is not None and load.rate < 0:  # a share of the capacity
                capacity = measured(replace(load, rate=None, even=False, callers=CAPACITY_CALLERS))
                if _has_failed(capacity) or not capacity["messages_per_second"]:
                    raise LoadFailed(f"what {CAPACITY_CALLERS} callers get is not known, and so no share of it")
                load = replace(load, rate=-load.rate * capacity["messages_per_second"])
            measured(load)
    except (OSError, LoadFailed) as error:  # first: errors of certificates are ValueErrors, too
        print(f"mnist-grpc bench: {door.target}: {error}", file=sys.stderr)
        code = 1
    except ValueError as error:
        print(f"mnist-grpc bench: {door.target}: {error}", file=sys.stderr)
        code = 2
    if runs and not options.json and not options.no_ceiling:
        print("\nceiling/s: messages a second of the generator itself, at a server that computes nothing")
    for found in runs:
        for remark in remarks(found):
            print(f"mnist-grpc bench: {found['name']}: {remark}", file=sys.stderr)
    if options.plot and runs:
        try:
            draw(options.plot, f"mnist-grpc bench, {door.target}", runs)
        except OSError as error:
            print(f"mnist-grpc bench: --plot: {error}", file=sys.stderr)
            code = code or 2
    return 1 if any(map(_has_failed, runs)) else code


def _has_failed(found: dict[str, Any]) -> bool:
    return bool(found["faults"]) or not found["latency_us"]["count"]


def known_digits(client: Client) -> list[int]:
    """What the server says of each of the bench's images, asked for them one at a time.

    Raises:
        MnistGrpcError: it does not answer, or reads less than nine of ten right, as no sound model does.
    """
    from client.load.images import images, labels
    from digits.preprocessing import SIDE

    # One at a time, and not together: under load each answer has to be what it is alone.
    found = [client.classify(image.reshape(SIDE, SIDE)).digit for image in images()]
    right = sum(map(int.__eq__, found, labels()))
    if right < 0.9 * len(found):
        raise ServerError(
            f"{client.target}: reads {right} of {len(found)} known digits right, and a model of digits nine of ten: "
            "what it answers under load cannot be checked"
        )
    return found


def _door(client: Client, options: argparse.Namespace) -> Door:
    """How the generator reaches the server that the client reaches."""
    try:
        from client.load.measure import Door
    except ImportError as error:
        if error.name != "hpack":
            raise
        raise ValueError("needs hpack: pip install 'mnist-grpc[bench]'") from error
    target = client.target
    host, _, port = target.rpartition(":")
    if not host or not port.isdecimal() or "," in target or "/" in target:
        raise ValueError(
            f"takes one server as host:port, by --target or ${TARGET_VARIABLE} (default: {DEFAULT_TARGET}), "
            f"not {target!r}"
        )
    settings = client._settings
    metadata = settings.metadata_of_call("bench")
    if settings.tls is None:
        return Door(target, metadata=metadata)
    return Door(target, _context(settings.tls), settings.tls.server_name, metadata)


def _context(tls: TLS) -> ssl.SSLContext:
    """For certificates in files, which is how the options name them."""
    context = ssl.create_default_context(cafile=tls.ca)
    context.set_alpn_protocols(["h2"])
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    return context


def _loads(options: argparse.Namespace) -> list[Load]:
    from client.load.measure import Load

    base = Load(
        kind=options.kind,
        even=options.even,
        connections=options.connections,
        seconds=options.seconds,
        warm_up=options.warm_up,
        patience=options.timeout,
    )
    if options.rate:
        return [replace(base, images=n, rate=rate) for n, rate in itertools.product(options.images, options.rate)]
    callers = options.callers or [1, 64]
    return [replace(base, images=n, callers=count) for n, count in itertools.product(options.images, callers)]


def _checked(kind: Callable[[str], Any], what: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < 1e9:
            raise argparse.ArgumentTypeError(f"{what}, not {text!r}")
        return value

    return read


_count = _checked(int, "a whole number, 1 or more")
_positive = _checked(float, "a number above 0")


def _counts(text: str) -> list[int]:
    return [_count(one) for one in text.split(",")]


def _rates(text: str) -> list[float]:
    """Shares of the capacity are negative."""
    return [-_positive(one[:-1]) / 100 if one.endswith("%") else _positive(one) for one in text.split(",")]
