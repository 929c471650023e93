"""The command line for people: `mnist-grpc classify digit.png`."""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from client._channel import DEFAULT_TARGET, TARGET_VARIABLE, TLS
from client._core import DEFAULT_TIMEOUT, checked_timeout
from client._errors import MnistGrpcError
from client._sync import Client
from client._types import Prediction
from client.load.command import add_command as add_bench
from client.video.command import add_command as add_video
from digits.preprocessing import MAX_CLASSES

VARIABLE_PREFIX = "MNIST_GRPC_"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0 if all went well, 1 if something did not, 2 for a wrong command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if getattr(options, "explain", None) is not None and len(options.images) != 1:
        parser.error(f"--explain draws one image, not {len(options.images)}")
    try:
        opened = _client(options)
    except ValueError as error:
        parser.error(str(error))
    with opened as client:
        try:
            result: int = options.run(client, options)
        except MnistGrpcError as error:
            print(f"mnist-grpc: {error}", file=sys.stderr)
            return 1
        except BrokenPipeError:  # as of `mnist-grpc classify ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except KeyboardInterrupt:
            return 130
    return result


def _client(options: argparse.Namespace) -> Client:
    """The client that the common options describe; what is given for TLS asks for TLS.

    Raises:
        ValueError: an option, or a file that it names, cannot be used.
    """
    tls = options.tls
    if options.ca or options.cert or options.key or options.server_name:
        tls = TLS(options.ca, options.cert, options.key, options.server_name)
    token = None if options.token_file is None else functools.partial(_read_token, options.token_file)
    if token is not None:
        token()  # what is wrong with the file is told before anything is done
    return Client(options.target, timeout=options.timeout, tls=tls, token=token)


def _read_token(path: str) -> str:
    """The first token of a file as the server has one: a token a line, comments after #."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the token file {path}: {getattr(error, 'strerror', None) or 'no UTF-8 text'}") from error
    for line in map(str.strip, lines):
        if line and not line.startswith("#"):
            return line
    raise ValueError(f"the token file {path} holds no token")


def _classify(client: Client, options: argparse.Namespace) -> int:
    """Print a line for each image as soon as it is read; a bad image stops nothing."""
    images = [sys.stdin.buffer.read() if name == "-" else name for name in options.images]
    if options.explain is not None:
        return _explain(client, options, images[0])
    width = max(len(name) for name in options.images)
    failed = False
    for name, result in zip(options.images, client.stream_classify(images), strict=True):
        if isinstance(result, Prediction):
            print(_json_line(name, result) if options.json else _line(name, width, result, options.top), flush=True)
            continue
        failed = True
        if options.json:
            print(json.dumps({"image": name, "error": str(result)}), flush=True)
        else:
            print(f"mnist-grpc: {name}: {result}", file=sys.stderr)
    return 1 if failed else 0


def _explain(client: Client, options: argparse.Namespace, image: str | bytes) -> int:
    """Print the line of one image, and write the picture that explains it."""
    (name,) = options.images
    prediction, picture = client._explain(image, None)
    try:
        picture.save(options.explain)
    except (OSError, ValueError) as error:  # ValueError: no format has such a suffix
        reason = getattr(error, "strerror", None) or error
        print(f"mnist-grpc: {options.explain} cannot be written: {reason}", file=sys.stderr)
        return 1
    print(_json_line(name, prediction) if options.json else _line(name, len(name), prediction, options.top))
    return 0


def _line(name: str, width: int, prediction: Prediction, top: int) -> str:
    labels = prediction.labels
    order = [digit for digit in prediction.probabilities.argsort()[::-1] if labels[digit]][:top]  # others are no class
    longest = max(map(len, labels))
    answers = "   ".join(f"{labels[digit]:<{longest}}  {prediction.probabilities[digit]:6.1%}" for digit in order)
    return f"{name:<{width}}  {answers}" + ("   looks like no digit" if prediction.is_digit is False else "")


def _json_line(name: str, prediction: Prediction) -> str:
    return json.dumps(
        {
            "image": name,
            "digit": prediction.digit,
            "label": prediction.label,
            "confidence": round(prediction.confidence, 6),
            "probabilities": [round(value, 6) for value in prediction.probabilities.tolist()],
            "digit_score": None if math.isnan(prediction.digit_score) else round(prediction.digit_score, 6),
            "is_digit": prediction.is_digit,
            "model_version": prediction.model_version,
        }
    )


def _health(client: Client, options: argparse.Namespace) -> int:
    serving = client.is_serving()
    state = "serving" if serving else "not serving"
    print(json.dumps({"target": client.target, "status": state}) if options.json else f"{client.target}: {state}")
    return 0 if serving else 1


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--target", help=f"server, host:port (default: ${TARGET_VARIABLE}, else {DEFAULT_TARGET})")
    common.add_argument(
        "--timeout", type=_seconds, default=DEFAULT_TIMEOUT, help="seconds a call may take (default: %(default)g)"
    )
    secure = common.add_argument_group("security", f"paths also by ${VARIABLE_PREFIX}CA, _CERT, _KEY and _TOKEN_FILE")
    secure.add_argument("--tls", action="store_true", help="use TLS; the options --ca to --server-name imply it")
    secure.add_argument("--ca", **_path("ca"), help="authorities (PEM) to trust (default: those that gRPC brings)")
    secure.add_argument("--cert", **_path("cert"), help="certificate (PEM) of this client, if the server asks for one")
    secure.add_argument("--key", **_path("key"), help="private key (PEM) of --cert")
    secure.add_argument("--server-name", metavar="NAME", help="name in the server's certificate, if not the target's")
    secure.add_argument("--token-file", **_path("token_file"), help="file of which the first token goes with each call")
    common.add_argument("--json", action="store_true", help="one JSON object a line, for programs")
    parser = argparse.ArgumentParser(
        prog="mnist-grpc", description="Read handwritten digits with an mnist-grpc server."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    classify = commands.add_parser("classify", parents=[common], help="read the digit in each image")
    classify.add_argument("images", nargs="+", metavar="IMAGE", help="an image file; - is standard input")
    classify.add_argument(
        "--top",
        type=int,
        choices=range(1, MAX_CLASSES + 1),
        default=1,
        metavar="N",
        help=f"answers an image, 1 to {MAX_CLASSES}, or as many as there are classes (default: 1)",
    )
    classify.add_argument(
        "--explain",
        metavar="PICTURE",
        help="also draw how the image is read, to this file (.png, .jpg, ...); with one image",
    )
    classify.set_defaults(run=_classify)

    health = commands.add_parser("health", parents=[common], help="ask whether the server serves; exit code 0 if so")
    health.set_defaults(run=_health)

    add_video(commands, common)
    add_bench(commands, common)
    return parser


def _path(name: str) -> dict[str, Any]:
    return {"metavar": "FILE", "default": os.environ.get(f"{VARIABLE_PREFIX}{name.upper()}") or None}


def _seconds(text: str) -> float:
    try:
        return checked_timeout(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a timeout is a number of seconds above 0, not {text!r}") from None


if __name__ == "__main__":
    raise SystemExit(main())
