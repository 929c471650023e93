"""`mnist-grpc video` as a process: what it prints, writes, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import termios
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import client

av = pytest.importorskip("av")

if TYPE_CHECKING:
    from tests.client.video.conftest import Clip

HOME = Path(client.__file__).parents[1]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "client", "video", *map(str, arguments)]


def mnist_grpc_video(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=HOME, capture_output=True, text=True, timeout=90)


def count_frames(path: Path) -> int:
    with av.open(path) as container:
        return sum(1 for _ in container.decode(video=0))


def test_people_get_a_line_a_change_and_a_summary(clip: Clip, server_address: str) -> None:
    process = mnist_grpc_video(clip.path, "--target", server_address)
    assert (process.returncode, process.stderr) == (0, "")
    *changes, summary = process.stdout.splitlines()
    line = re.compile(r"0:00:0[012]\.\d\d  #\d  +(appears|becomes|leaves)  \d  +\d+\.\d%  \d+x\d+\+\d+\+\d+")
    assert changes
    assert all(line.fullmatch(change) for change in changes), changes
    assert re.fullmatch(r"50 frames, 2\.0 s, \d+ digits: [\d ]+", summary)
    right = {7, 2, 3, 0, 4, 6} & set(map(int, summary.split(": ")[1].split()))
    assert len(right) >= 4


def test_programs_get_an_object_a_frame(clip: Clip, server_address: str) -> None:
    process = mnist_grpc_video(clip.path, "--json", "--every", "5", "--target", server_address)
    assert (process.returncode, process.stderr) == (0, "")
    frames = [json.loads(line) for line in process.stdout.splitlines()]
    assert [frame["frame"] for frame in frames] == list(range(0, 50, 5))
    assert frames[1]["seconds"] == pytest.approx(0.2)
    assert frames[-1]["digits"]
    for digit in frames[-1]["digits"]:
        assert digit.keys() == {"track", "box", "digit", "confidence", "seen"}
        assert 0 <= digit["box"]["left"] < digit["box"]["right"] <= 480
        assert 0 <= digit["box"]["top"] < digit["box"]["bottom"] <= 360


def test_the_annotated_video_has_all_frames(clip: Clip, server_address: str, tmp_path: Path) -> None:
    annotated = tmp_path / "out.mp4"
    process = mnist_grpc_video(clip.path, "--annotate", annotated, "--target", server_address)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.splitlines()[-1] == f"{annotated}: 50 frames written"
    assert count_frames(annotated) == 50


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_an_annotated_video_that_plays(
    clip: Clip, server_address: str, tmp_path: Path, how: signal.Signals
) -> None:
    long, annotated = tmp_path / "long.mp4", tmp_path / "out.mp4"
    with av.open(clip.path) as source, av.open(long, "w") as target:  # the clip ten times over
        stream = target.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 480, 360, "yuv420p"
        for index, frame in enumerate(list(source.decode(video=0)) * 10):
            frame.pts, frame.time_base, frame.pict_type = index, Fraction(1, 25), 0
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    with subprocess.Popen(
        command(long, "--json", "--annotate", annotated, "--target", server_address),
        cwd=HOME,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.send_signal(how)  # its lines for 500 frames do not fit the pipe: it cannot be at the end yet
        lines = process.stdout.read().splitlines()
        assert process.stderr.read() == ""
    assert process.returncode == 130
    assert 1 + len(lines) <= count_frames(annotated) < 500


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals")
def test_a_terminal_gets_a_progress_bar(clip: Clip, server_address: str) -> None:
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with subprocess.Popen(
        command(clip.path, "--target", server_address), cwd=HOME, stdout=subprocess.PIPE, stderr=theirs, text=True
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # how Linux says that the other side is closed
                break
            if not piece:
                break
            shown += piece
        os.close(ours)
    assert process.returncode == 0
    assert re.search(rb"reading: +100%.*50/50", shown)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing.mp4"], "'missing.mp4' cannot be opened: No such file or directory"),
        (["pyproject.toml"], "'pyproject.toml' holds no video"),
        (["client"], "'client' is a folder, not a video"),
        (["--camera", "63"], "camera 63 cannot be opened"),
        (["63"], "camera 63 cannot be opened"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_source_that_gives_no_frames_is_one_line(arguments: list[str], says: str) -> None:
    process = mnist_grpc_video(*arguments)
    assert (process.returncode, process.stdout) == (1, "")
    [line] = process.stderr.splitlines()
    assert line.startswith(f"mnist-grpc: {says}")


def test_the_video_that_is_read_is_not_replaced(clip: Clip) -> None:
    process = mnist_grpc_video(clip.path, "--annotate", clip.path)
    assert process.returncode == 1
    assert "would replace the one that is read" in process.stderr
    assert count_frames(clip.path) == 50


def test_without_the_extra_the_message_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "av.py").write_text("raise ModuleNotFoundError(\"No module named 'av'\", name='av')")
    process = subprocess.run(
        command("clip.mp4"),
        cwd=HOME,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(HOME)])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 1
    assert "pip install 'mnist-grpc[video]'" in process.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a.mp4", "--every", "0"],
        ["a.mp4", "--fps", "0"],
        ["a.mp4", "--fps", "nan"],
        ["a.mp4", "--every", "2", "--fps", "3"],
    ],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_a_wrong_command_line_is_explained(arguments: list[str]) -> None:
    process = mnist_grpc_video(*arguments)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("usage: mnist-grpc video")
