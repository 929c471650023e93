"""What the README shows is what happens: its Python blocks and its commands, run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

StartServer = Callable[..., tuple[str, subprocess.Popen[str]]]


def same(shown: str, printed: str) -> bool:
    """Equal but for the last digits of fractions, in which builds of torch differ, and the port."""

    def coarse(text: str) -> str:
        text = re.sub(r"(localhost|127\.0\.0\.1):\d+", "HOST:PORT", text)
        return re.sub(r"\d+\.\d+(e-\d+)?|\d+e-\d+", lambda match: f"{float(match[0]):.1f}", text).strip()

    return coarse(shown) == coarse(printed)


def run(command: list[str], address: str) -> str:
    environment = os.environ | {"MNIST_GRPC_TARGET": address, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert not done.stderr, done.stderr
    return done.stdout


def test_the_python_blocks_print_what_the_readme_shows(server_process: StartServer) -> None:
    address, _ = server_process()
    blocks = re.findall(r"```python\n(.*?)```\n(?:(?!```).)*?```text\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for code, shown in blocks:
        printed = run([sys.executable, "-c", code.replace("localhost:50051", address)], address)
        assert same(shown, printed), printed


def test_the_shell_commands_print_what_the_readme_shows(server_process: StartServer) -> None:
    address, _ = server_process()
    (block,) = re.findall(r"```console\n(\$ .*?)```", README, re.DOTALL)
    commands = re.findall(r"^\$ mnist-grpc (.*)\n((?:(?!\$).*\n)*)", block, re.MULTILINE)
    assert len(commands) == 3
    for arguments, shown in commands:
        printed = run([sys.executable, "-m", "client", *arguments.split()], address)
        assert same(shown, printed), printed


def test_files_that_the_readme_links_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link
