"""Forked processes: each case forks for real, in a fresh process, and has a child that makes a call within 5 s."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import client

GreyImage = npt.NDArray[np.uint8]
HOME = Path(client.__file__).parents[1]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

COMMON = """
import asyncio, multiprocessing, os, signal, sys, threading
import numpy as np
import client

address = sys.argv[1]
image = np.frombuffer(bytes.fromhex(sys.argv[2]), np.uint8).reshape(28, 28)
signal.alarm(30)

def in_child(action):
    child = os.fork()
    if child == 0:
        signal.alarm(5)  # which a forked process does not inherit
        try:
            print(action(), flush=True)
        except RuntimeError as error:
            print(error, flush=True)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def one_liner():
    return client.classify(image, target=address).digit

async def read(digits):
    async with digits:
        return (await digits.classify(image)).digit

def awaited():
    return asyncio.run(read(client.AsyncClient(address)))
"""


def run(script: str, address: str, image: GreyImage) -> list[str]:
    """What the script printed; its last word is `parent`, as a parent has to survive its child."""
    process = subprocess.run(
        [sys.executable, "-c", COMMON + script, address, image.tobytes().hex()],
        cwd=HOME,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0, process.stderr
    *lines, last = process.stdout.splitlines()
    assert last == "parent 7", process.stdout + process.stderr
    return lines


@pytest.mark.parametrize("child", ["shared.classify(image).digit", "one_liner()", "awaited()"])
@pytest.mark.parametrize(
    "before",
    ["pass", "shared.classify(image)", "one_liner()", "first.classify(image); first.close()"],
    ids=["unused", "used", "one-liner used", "used and closed"],
)
def test_a_child_makes_calls_of_its_own(server_address: str, digits: list[GreyImage], before: str, child: str) -> None:
    lines = run(
        f"""
first, shared = client.Client(address), client.Client(address)
{before}
assert in_child(lambda: {child}) == 0
print("parent", shared.classify(image).digit)
""",
        server_address,
        digits[7],
    )
    assert lines == ["7"]


@pytest.mark.parametrize("child", ["shared.classify(image).digit", "one_liner()", "awaited()"])
def test_a_child_of_a_process_in_the_middle_of_a_call_is_told_and_its_parent_goes_on(
    server_address: str, digits: list[GreyImage], child: str
) -> None:
    [line] = run(
        f"""
shared = client.Client(address)
asked = threading.Event()
def frames():
    yield image
    asked.wait()
results = shared.stream_classify(frames())
assert next(results).digit == 7
assert in_child(lambda: {child}) == 0
asked.set()
assert list(results) == []
print("parent", shared.classify(image).digit)
""",
        server_address,
        digits[7],
    )
    assert line.startswith("this process was forked from one that had a call under way in another thread")
    assert "spawn" in line


@pytest.mark.parametrize("child", ["shared.classify(image).digit", "one_liner()", "awaited()"])
def test_a_child_of_a_process_that_used_asyncio_is_told_and_its_parent_goes_on(
    server_address: str, digits: list[GreyImage], child: str
) -> None:
    [line] = run(
        f"""
shared = client.Client(address)
async def main():
    async with client.AsyncClient(address) as digits:
        assert (await digits.classify(image)).digit == 7
        assert in_child(lambda: {child}) == 0
        return (await digits.classify(image)).digit
print("parent", asyncio.run(main()))
""",
        server_address,
        digits[7],
    )
    assert line.startswith("this process was forked from one that used gRPC for asyncio")
    assert "spawn" in line


def test_a_child_may_use_an_async_client_that_its_parent_made_and_did_not_use(
    server_address: str, digits: list[GreyImage]
) -> None:
    lines = run(
        """
made = client.AsyncClient(address)
assert in_child(lambda: asyncio.run(read(made))) == 0
print("parent", asyncio.run(read(made)))
""",
        server_address,
        digits[7],
    )
    assert lines == ["7"]


def test_a_lock_that_was_held_at_the_fork_does_not_hang_the_child(server_address: str, digits: list[GreyImage]) -> None:
    lines = run(
        """
from client import _default
shared = client.Client(address)
held, go = threading.Event(), threading.Event()
def hold():
    with _default._lock, shared._opening:
        held.set()
        go.wait()
threading.Thread(target=hold).start()
held.wait()
assert in_child(lambda: (shared.classify(image).digit, one_liner())) == 0
go.set()
print("parent", shared.classify(image).digit)
""",
        server_address,
        digits[7],
    )
    assert lines == ["(7, 7)"]


def test_the_workers_of_a_pool_of_processes_share_a_client_by_its_name(
    server_address: str, digits: list[GreyImage]
) -> None:
    lines = run(
        """
shared = client.Client(address)
assert shared.classify(image).digit == 7
def work(_):
    return shared.classify(image).digit, one_liner()
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map_async(work, range(8), chunksize=1).get(20) == [(7, 7)] * 8)
print("parent", shared.classify(image).digit)
""",
        server_address,
        digits[7],
    )
    assert lines == ["True"]


def test_workers_that_are_forked_again_and_again_from_a_process_that_calls_all_work(
    server_address: str, digits: list[GreyImage]
) -> None:
    lines = run(
        """
def worker():  # as those of a server that loads the application before it forks
    mine = [shared.classify(image).digit for _ in range(3)]
    def grandchild():
        return shared.classify(image).digit
    assert in_child(grandchild) == 0
    return mine
with client.Client(address) as shared:
    shared.wait_ready()
    for _ in range(3):
        assert shared.classify(image).digit == 7
        assert in_child(worker) == 0
    print("parent", shared.classify(image).digit)
""",
        server_address,
        digits[7],
    )
    assert lines == ["7", "[7, 7, 7]"] * 3


def test_a_child_that_ends_as_programs_do_leaves_its_parents_connection_alone(
    server_address: str, digits: list[GreyImage]
) -> None:
    lines = run(
        """
shared = client.Client(address)
def frames():
    for _ in range(2):
        yield image
assert [result.digit for result in shared.stream_classify(frames())] == [7, 7]
child = os.fork()
if child == 0:
    signal.alarm(5)
    print(shared.classify(image).digit)
    sys.exit(0)  # with all that Python does at an end
assert os.waitpid(child, 0)[1] == 0
print("parent", shared.classify(image).digit)
shared.close()
""",
        server_address,
        digits[7],
    )
    assert lines == ["7"]
