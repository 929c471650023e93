"""The command line for people: `mnist-grpc classify digit.png`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from client._core import DEFAULT_TARGET, DEFAULT_TIMEOUT, TARGET_VARIABLE, checked_timeout
from client._errors import MnistGrpcError
from client._sync import Client
from client._types import Prediction
from client.video.command import add_command as add_video


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0 if all went well, 1 if something did not, 2 for a wrong command line."""
    options = _parser().parse_args(arguments)
    with Client(options.target, timeout=options.timeout) as client:
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


def _classify(client: Client, options: argparse.Namespace) -> int:
    """Print a line for each image as soon as it is read; a bad image stops nothing."""
    images = [sys.stdin.buffer.read() if name == "-" else name for name in options.images]
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


def _line(name: str, width: int, prediction: Prediction, top: int) -> str:
    order = prediction.probabilities.argsort()[::-1][:top]
    answers = "   ".join(f"{digit}  {prediction.probabilities[digit]:6.1%}" for digit in order)
    return f"{name:<{width}}  {answers}"


def _json_line(name: str, prediction: Prediction) -> str:
    return json.dumps(
        {
            "image": name,
            "digit": prediction.digit,
            "confidence": round(prediction.confidence, 6),
            "probabilities": [round(value, 6) for value in prediction.probabilities.tolist()],
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
    common.add_argument("--json", action="store_true", help="one JSON object a line, for programs")
    parser = argparse.ArgumentParser(
        prog="mnist-grpc", description="Read handwritten digits with an mnist-grpc server."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    classify = commands.add_parser("classify", parents=[common], help="read the digit in each image")
    classify.add_argument("images", nargs="+", metavar="IMAGE", help="an image file; - is standard input")
    classify.add_argument(
        "--top", type=int, choices=range(1, 11), default=1, metavar="N", help="answers an image, 1 to 10 (default: 1)"
    )
    classify.set_defaults(run=_classify)

    health = commands.add_parser("health", parents=[common], help="ask whether the server serves; exit code 0 if so")
    health.set_defaults(run=_health)

    add_video(commands, common)
    return parser


def _seconds(text: str) -> float:
    try:
        return checked_timeout(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a timeout is a number of seconds above 0, not {text!r}") from None


if __name__ == "__main__":
    raise SystemExit(main())
