"""Weights from the disk, exchanged as a whole or not at all, and taken back; with a function for the server."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import pytest

from digits.snapshot import Snapshot, manifest_path
from server.deployment import Deployment, NothingToRollBackTo
from server.errors import CannotServe
from server.observer import Observer


class Server:
    """Serves every snapshot but those that say `bad`."""

    def __init__(self) -> None:
        self.served: list[bytes] = []
        self.changed = asyncio.Event()

    async def deploy(self, snapshot: Snapshot) -> None:
        self.changed.set()
        if b"bad" in snapshot.weights:
            raise CannotServe("these weights are bad")
        self.served.append(snapshot.weights)


class Outcomes(Observer):
    def __init__(self) -> None:
        self.all: list[str] = []
        self.changed = asyncio.Event()

    def reload_ended(self, outcome: str) -> None:
        self.all.append(outcome)
        self.changed.set()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "mnist_model.pth"
    path.write_bytes(b"one")
    return path


async def test_the_file_is_served_again_when_asked_for(weights: Path) -> None:
    server, outcomes = Server(), Outcomes()
    deployment = Deployment(str(weights), server.deploy, outcomes)
    await deployment.first()
    weights.write_bytes(b"two")
    served = await deployment.reload()
    assert server.served == [b"one", b"two"]
    assert deployment.current is not None
    assert deployment.previous is not None
    assert (served.version, served.previous_version) == (deployment.current.version, deployment.previous.version)
    assert served.version != served.previous_version
    assert outcomes.all == ["served"]


async def test_a_refused_file_changes_nothing_and_is_told(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    server, outcomes = Server(), Outcomes()
    deployment = Deployment(str(weights), server.deploy, outcomes)
    await deployment.first()
    version = deployment.current and deployment.current.version
    weights.write_bytes(b"bad")
    with pytest.raises(CannotServe, match="these weights are bad"):
        await deployment.reload()
    weights.unlink()
    with pytest.raises(CannotServe, match=r"mnist_model\.pth: cannot be read"):
        await deployment.reload()
    assert server.served == [b"one"]
    assert deployment.current is not None
    assert deployment.current.version == version
    assert deployment.previous is None
    assert outcomes.all == ["refused", "refused"]
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 2
    assert "these weights are bad" in caplog.text


async def test_the_same_file_is_not_served_twice_but_another_manifest_is(weights: Path) -> None:
    server, outcomes = Server(), Outcomes()
    deployment = Deployment(str(weights), server.deploy, outcomes)
    await deployment.first()
    await deployment.reload()
    manifest_path(weights).write_text(json.dumps({"temperature": 2}))
    await deployment.reload()
    assert server.served == [b"one", b"one"]
    assert outcomes.all == ["unchanged", "served"]


async def test_rollback_goes_back_and_forth_between_two_versions(weights: Path) -> None:
    server, outcomes = Server(), Outcomes()
    deployment = Deployment(str(weights), server.deploy, outcomes)
    await deployment.first()
    with pytest.raises(NothingToRollBackTo, match="is the first that is served"):
        await deployment.rollback()
    weights.write_bytes(b"two")
    new = await deployment.reload()
    old = await deployment.rollback()
    assert (old.version, old.previous_version) == (new.previous_version, new.version)
    assert (await deployment.rollback()).version == new.version
    assert server.served == [b"one", b"two", b"one", b"two"]
    assert outcomes.all == ["served", "rolled_back", "rolled_back"]


async def test_reloads_and_rollbacks_take_turns(weights: Path) -> None:
    running = 0

    async def deploy(snapshot: Snapshot) -> None:
        nonlocal running
        running += 1
        assert running == 1
        await asyncio.sleep(0)
        running -= 1

    deployment = Deployment(str(weights), deploy)
    await deployment.first()
    weights.write_bytes(b"two")
    await deployment.reload()
    outcomes = await asyncio.gather(*(deployment.rollback() for _ in range(5)), deployment.reload())
    assert len({outcome.version for outcome in outcomes}) == 2


async def test_a_file_that_is_replaced_is_noticed_and_a_bad_one_is_tried_once(weights: Path) -> None:
    server, outcomes = Server(), Outcomes()
    deployment = Deployment(str(weights), server.deploy, outcomes)
    await deployment.first()
    watching = asyncio.create_task(deployment.watch(0.01, asyncio.Event()))
    for content in (b"bad", b"two"):
        weights.write_bytes(content)
        await asyncio.wait_for(outcomes.changed.wait(), 20)
        outcomes.changed.clear()
    watching.cancel()
    assert outcomes.all == ["refused", "served"]
    assert server.served == [b"one", b"two"]


async def test_whoever_is_told_to_reload_reads_the_file_though_nobody_looks_at_it(weights: Path) -> None:
    server, told = Server(), asyncio.Event()
    deployment = Deployment(str(weights), server.deploy)
    await deployment.first()
    watching = asyncio.create_task(deployment.watch(0, told))
    weights.write_bytes(b"two")
    server.changed.clear()
    told.set()
    await asyncio.wait_for(server.changed.wait(), 20)
    watching.cancel()
    assert server.served == [b"one", b"two"]


async def test_after_a_rollback_the_file_is_left_alone_until_it_changes(weights: Path) -> None:
    server, outcomes = Server(), Outcomes()
    deployment = Deployment(str(weights), server.deploy, outcomes)
    await deployment.first()
    weights.write_bytes(b"two")
    await deployment.reload()
    await deployment.rollback()
    told = asyncio.Event()
    watching = asyncio.create_task(deployment.watch(0.001, told))
    weights.with_suffix(".other").write_bytes(b"")
    for _ in range(3):  # three looks at least
        await asyncio.sleep(0.001)
    assert server.served[-1] == b"one"
    server.changed.clear()
    weights.write_bytes(b"three")
    await asyncio.wait_for(server.changed.wait(), 20)
    watching.cancel()
    assert server.served == [b"one", b"two", b"one", b"three"]
