"""Triton's backend in C++, as far as it goes without Triton: what it reads, how it computes, what it cannot be made of.

The requests of a real server are in test_peers.py, where the environment is there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from bench.peers import peer as peers
from bench.peers.adapters import PEERS, triton_cpp
from bench.peers.peer import CannotStart, Place
from client.load.images import images

SOURCES = peers.SERVERS / "triton_cpp"
WEIGHTS_BYTES = 4 * (3 + 784 * 256 + 256 + 256 * 128 + 128 + 128 * 10 + 10)
PROGRAM = """
#include <cstdio>
#include "network.h"
int main(int, char** paths) try {
    const c10::InferenceMode guard;
    const Network network(paths[1]);
    for (int64_t rows = 0; std::fread(&rows, sizeof rows, 1, stdin) == 1;) {
        at::Tensor pixels = at::empty({rows, kPixels}, at::kByte);
        if (std::fread(pixels.data_ptr(), kPixels, rows, stdin) != static_cast<size_t>(rows)) return 2;
        const at::Tensor probabilities = network(pixels.to(at::kFloat)).contiguous();
        std::fwrite(probabilities.const_data_ptr(), kClasses * sizeof(float), rows, stdout);
    }
} catch (const std::exception& error) {
    std::fputs(error.what(), stderr);
    return 1;
}
"""
"""Probabilities on stdout, of blocks on stdin: the number of rows, then these."""

needs_a_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.f32"
    triton_cpp.write_weights(path)
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    (folder / "program.cc").write_text(PROGRAM)
    subprocess.run([SOURCES / "build", sys.executable, folder / "program", folder / "program.cc"], check=True)
    return folder / "program"


def probabilities(program: Path, weights: Path, blocks: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
    content = b"".join(len(block).to_bytes(8, sys.byteorder) + block.tobytes() for block in blocks)
    run = subprocess.run([program, weights], input=content, capture_output=True, check=True)
    return np.frombuffer(run.stdout, np.float32).reshape(-1, 10)


@needs_a_compiler
def test_it_computes_what_the_python_backend_computes(
    program: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few rows and with many, which go different ways."""
    for name, value in peers.variables().items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(peers.SERVERS))
    from digit_network import Digits

    pixels = images()
    blocks = [pixels[:1], pixels[1:3], pixels[3:10], pixels[10:18], pixels[18:55], pixels[55:]]
    found = probabilities(program, weights, blocks)
    np.testing.assert_allclose(found, Digits().probabilities(pixels), atol=1e-5)


@needs_a_compiler
@pytest.mark.parametrize("size", [0, 100, WEIGHTS_BYTES - 4, WEIGHTS_BYTES + 4])
def test_weights_of_another_size_are_refused(program: Path, weights: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "weights").write_bytes((weights.read_bytes() + bytes(4))[:size])
    run = subprocess.run([program, tmp_path / "weights"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert run.returncode == 1
    assert "is not a file of this network's weights" in run.stderr


def test_weights_are_those_of_the_checkpoint(weights: Path) -> None:
    from digits.checkpoint import load_checkpoint
    from server.settings import EMBEDDED_WEIGHTS

    checkpoint = load_checkpoint(EMBEDDED_WEIGHTS)
    assert weights.stat().st_size == WEIGHTS_BYTES
    values = np.fromfile(weights, "<f4")
    manifest = checkpoint.manifest
    np.testing.assert_allclose(values[:3], [manifest.mean, manifest.std, manifest.temperature])
    layers = checkpoint.network.state_dict()
    np.testing.assert_array_equal(values[3 : 3 + 784 * 256].reshape(256, 784), layers["fc1.weight"].numpy())
    np.testing.assert_array_equal(values[-10:], layers["fc3.bias"].numpy())


class Installed:
    """A copy of the script beside an environment that looks as if it had been installed: this one's interpreter."""

    def __init__(self, root: Path) -> None:
        self.environment = root / ".venv-peers" / "triton-cpp"
        self._root = root
        (root / "scripts").mkdir()
        shutil.copy(peers.ROOT / "scripts" / "bench-peers", root / "scripts")
        self.sources = root / "bench" / "peers" / "servers" / "triton_cpp"
        shutil.copytree(SOURCES, self.sources)
        for name, arguments in (("python", ""), ("pip", "-m pip")):
            command = self.environment / "bin" / name
            command.parent.mkdir(parents=True, exist_ok=True)
            command.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
            command.chmod(0o755)
        (self.environment / "lib").mkdir()
        (self.environment / "requirement").write_text("torch==1 nvidia-pytriton==0.7.*\n")

    def run(self, compiler: str | None = None) -> str:
        """What the script says on stderr."""
        variables = {**os.environ, "TORCH": "torch==1"}
        if compiler:
            variables["CXX"] = compiler
        arguments: list[str | Path] = [self._root / "scripts" / "bench-peers", sys.executable, "triton-cpp"]
        return subprocess.run(arguments, env=variables, capture_output=True, text=True, check=True).stderr


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path / ".venv-peers")
    return Installed(tmp_path)


def test_a_missing_compiler_is_told_in_the_table(installed: Installed) -> None:
    assert "triton-cpp: ERROR: no C++ compiler no-such-compiler" in installed.run("no-such-compiler")
    with pytest.raises(CannotStart, match=r"not installed: ERROR: no C\+\+ compiler no-such-compiler"):
        PEERS["triton-cpp"].python()


@needs_a_compiler
def test_it_is_compiled_once_and_again_when_a_source_is_newer(installed: Installed) -> None:
    (installed.environment / "failed").write_text("ERROR: no C++ compiler\n")
    installed.run()
    library = triton_cpp.library(PEERS["triton-cpp"].python())
    compiled = library.stat().st_mtime_ns
    installed.run("no-such-compiler")
    assert library.stat().st_mtime_ns == compiled

    source = installed.sources / "backend.cc"
    source.write_text("no C++;\n")
    os.utime(source, ns=(compiled + 10**9, compiled + 10**9))
    assert "triton-cpp: " in installed.run()
    with pytest.raises(CannotStart, match=r"not installed: .*backend\.cc:1:1: error: "):
        PEERS["triton-cpp"].python()
    assert not library.exists()


def test_without_its_library_it_cannot_start(tmp_path: Path) -> None:
    place = Place(tmp_path / "bin" / "python", tmp_path / "folder", (1, 2))
    with pytest.raises(CannotStart, match="not compiled: scripts/bench-peers"):
        PEERS["triton-cpp"].start(place)
