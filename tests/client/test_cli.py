"""`python -m client` as a process: what it prints, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import client
from client import cli
from client.testing import FakeServer

if TYPE_CHECKING:
    from tests.client.conftest import Fakes

GreyImage = npt.NDArray[np.uint8]
HOME = Path(client.__file__).parents[1]


def mnist_grpc(
    *arguments: str | Path, target: str = "", stdin: bytes = b"", **environment: str
) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MNIST_GRPC_")}
    process = subprocess.run(
        [sys.executable, "-m", "client", *map(str, arguments)],
        cwd=HOME,
        env=inherited | ({"MNIST_GRPC_TARGET": target} if target else {}) | environment,
        input=stdin,
        capture_output=True,
        timeout=60,
    )
    return subprocess.CompletedProcess(
        process.args, process.returncode, process.stdout.decode(), process.stderr.decode()
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, digits: list[GreyImage]) -> list[Path]:
    """PNG files; file i shows the digit i."""
    folder = tmp_path_factory.mktemp("digits")
    paths = [folder / f"digit-{index}.png" for index in range(10)]
    for path, image in zip(paths, digits[:10], strict=True):
        Image.fromarray(image).save(path)
    return paths


def test_people_get_a_line_for_each_image(server_address: str, files: list[Path]) -> None:
    process = mnist_grpc("classify", *files, "--target", server_address)
    assert (process.returncode, process.stderr) == (0, "")
    lines = process.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [[str(path), str(index)] for index, path in enumerate(files)]
    assert all(line.endswith("%") for line in lines)


def test_programs_get_a_json_object_for_each_image(server_address: str, files: list[Path]) -> None:
    process = mnist_grpc("classify", "--json", *files, target=server_address)
    assert (process.returncode, process.stderr) == (0, "")
    answers = [json.loads(line) for line in process.stdout.splitlines()]
    assert [(answer["image"], answer["digit"]) for answer in answers] == [
        (str(path), index) for index, path in enumerate(files)
    ]
    for answer in answers:
        assert len(answer["probabilities"]) == 10
        assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-4)
        assert answer["confidence"] == max(answer["probabilities"])
        assert len(answer["model_version"]) == 12


def test_a_picture_that_looks_like_no_digit_is_told(files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer([7, (3, 0.15)] * 2) as server:
        command = ["classify", str(files[7]), str(files[3]), "--target", server.target]
        assert cli.main(command) == 0
        sure, unsure = capsys.readouterr().out.splitlines()
        assert cli.main([*command, "--json"]) == 0
        answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sure.endswith("%")
    assert unsure.split(maxsplit=1)[1].split(maxsplit=2) == ["3", "15.0%", "looks like no digit"]
    assert [(answer["digit_score"], answer["is_digit"]) for answer in answers] == [(9.9, True), (1.5, False)]


def test_classes_have_the_names_that_the_model_gives_them(
    files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeServer(1) as server:
        server.model = replace(server.model, labels=("T-shirt", "Trouser", *"23456789"))
        command = ["classify", str(files[7]), "--target", server.target]
        assert cli.main([*command, "--top", "2"]) == 0
        assert capsys.readouterr().out.split()[1:3] == ["Trouser", "99.0%"]
        assert cli.main([*command, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
    assert (answer["digit"], answer["label"]) == (1, "Trouser")


def test_classes_without_a_name_are_no_answers(files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(1) as server:
        server.model = replace(server.model, labels=("cat", "dog", *[""] * 8))
        assert cli.main(["classify", str(files[7]), "--target", server.target, "--top", "4"]) == 0
    assert capsys.readouterr().out.split()[1::2] == ["dog", "cat"]


def test_what_an_older_server_does_not_say_is_null(
    fakes: Fakes, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["classify", str(files[7]), "--target", fakes.serve()]
    assert cli.main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["digit"], told["label"], told["digit_score"], told["is_digit"]) == (7, "7", None, None)
    assert cli.main(command) == 0
    assert capsys.readouterr().out.endswith("91.0%\n")


@pytest.mark.parametrize("top", [1, 3, 10])
def test_the_most_probable_answers_come_first(server_address: str, files: list[Path], top: int) -> None:
    process = mnist_grpc("classify", files[7], "--top", str(top), target=server_address)
    numbers = process.stdout.removeprefix(str(files[7])).replace("%", "").split()
    digits, shares = numbers[::2], [float(share) for share in numbers[1::2]]
    assert digits[0] == "7"
    assert len(set(digits)) == len(digits) == top
    assert shares == sorted(shares, reverse=True)


def test_a_bad_image_stops_nothing(server_address: str, files: list[Path], tmp_path: Path) -> None:
    no_image = tmp_path / "no-image.png"
    no_image.write_bytes(b"no image")
    missing = tmp_path / "missing.png"
    process = mnist_grpc("classify", files[3], no_image, missing, tmp_path, files[5], target=server_address)
    assert process.returncode == 1
    assert [line.split()[:2] for line in process.stdout.splitlines()] == [[str(files[3]), "3"], [str(files[5]), "5"]]
    complaints = process.stderr.splitlines()
    assert [complaint.split(": ")[:2] for complaint in complaints] == [
        ["mnist-grpc", str(path)] for path in (no_image, missing, tmp_path)
    ]


def test_programs_get_the_error_of_a_bad_image_in_its_place(server_address: str, files: list[Path]) -> None:
    process = mnist_grpc("classify", "--json", files[3], "missing.png", files[5], target=server_address)
    assert process.returncode == 1
    three, missing, five = (json.loads(line) for line in process.stdout.splitlines())
    assert (three["digit"], five["digit"]) == (3, 5)
    assert missing["image"] == "missing.png"
    assert "missing.png" in missing["error"]


def test_an_image_may_come_from_standard_input(server_address: str, files: list[Path]) -> None:
    process = mnist_grpc("classify", files[3], "-", target=server_address, stdin=files[7].read_bytes())
    assert process.returncode == 0
    assert [line.split()[:2] for line in process.stdout.splitlines()] == [[str(files[3]), "3"], ["-", "7"]]


@pytest.mark.parametrize("command", [["classify", "digit-7"], ["health"]], ids=["classify", "health"])
def test_no_server_is_one_line_and_no_traceback(fakes: Fakes, files: list[Path], command: list[str]) -> None:
    address = fakes.nobody()
    process = mnist_grpc(*(files[7] if word == "digit-7" else word for word in command), target=address)
    assert (process.returncode, process.stdout) == (1, "")
    [line] = process.stderr.splitlines()
    assert line.startswith(f"mnist-grpc: {address}: no server answers there")


def test_a_server_that_says_nothing_is_not_waited_for_longer_than_told(fakes: Fakes, files: list[Path]) -> None:
    process = mnist_grpc("classify", files[7], "--timeout", "0.3", target=fakes.black_hole())
    assert process.returncode == 1
    [line] = process.stderr.splitlines()
    assert "within 0.3 s" in line


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["classify"],
        ["read", "digit.png"],
        ["classify", "digit.png", "--top", "0"],
        ["classify", "digit.png", "--top", "eleven"],
        ["classify", "digit.png", "--timeout", "0"],
        ["classify", "digit.png", "--timeout", "nan"],
        ["classify", "digit.png", "--timeout", "soon"],
        ["classify", "digit.png", "--colour"],
        ["health", "digit.png"],
    ],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_a_wrong_command_line_is_explained(arguments: list[str]) -> None:
    process = mnist_grpc(*arguments)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("usage: mnist-grpc")
    assert "Traceback" not in process.stderr


def test_a_wrong_timeout_is_named_by_its_rule() -> None:
    assert "a number of seconds above 0, not 'soon'" in mnist_grpc("health", "--timeout", "soon").stderr


def test_help_is_a_manual() -> None:
    process = mnist_grpc("--help")
    assert (process.returncode, process.stderr) == (0, "")
    assert {"classify", "health"} <= set(process.stdout.split())


def test_health_tells_whether_the_server_serves(server_address: str) -> None:
    process = mnist_grpc("health", target=server_address)
    assert (process.returncode, process.stdout) == (0, f"{server_address}: serving\n")


@pytest.mark.parametrize(("status", "word", "code"), [(b"\x08\x01", "serving", 0), (b"\x08\x02", "not serving", 1)])
def test_programs_get_health_as_json_and_as_the_exit_code(fakes: Fakes, status: bytes, word: str, code: int) -> None:
    address = fakes.serve(check=lambda *_: status)
    process = mnist_grpc("health", "--json", target=address)
    assert json.loads(process.stdout) == {"target": address, "status": word}
    assert process.returncode == code


def test_a_reader_that_goes_away_is_no_traceback(server_address: str, files: list[Path]) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "client", "classify", "--target", server_address, *map(str, files * 20)],
        cwd=HOME,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # as `| head -0` does
        assert "Traceback" not in process.stderr.read()
