"""What is sent when, and what of it counts: the loops with lanes that only note what they are given."""

from __future__ import annotations

import itertools
import math
from collections import deque

import pytest

pytest.importorskip("hpack")

from client.load.jobs import Fault
from client.load.lanes import Answer
from client.load.loop import MESSAGES_A_TURN, Closed, Open, Outcome, TooFewCallers, evenly
from client.load.wire import MOST, ConnectionEnded


class NotingLane:
    """Nothing is ever answered."""

    def __init__(self, room: int = MOST) -> None:
        self.room = room
        self.most = MOST
        self.farewell = ""
        self.is_clogged = self.wants_to_write = False
        self.returned: deque[tuple[int, float]] = deque()
        self.sent: list[tuple[int, float]] = []
        self.under_way = 0

    @property
    def has_room(self) -> bool:
        return self.under_way < self.room

    def fileno(self) -> int:
        return -1

    def send(self, number: int, meant: float) -> None:
        self.sent.append((number, meant))
        self.under_way += 1

    def flush(self) -> None:
        pass

    def exchange(self) -> list[Answer]:
        return []

    def finish(self, patience: float) -> Fault | None:
        return None

    def close(self) -> None:
        pass


def test_a_message_that_has_waited_for_the_server_keeps_its_time() -> None:
    lane = NotingLane(room=0)
    sender = Open([lane], evenly(10, 1))
    assert sender.turn(12.5, 20) == 20  # it is for the server now
    lane.room = 2
    sender.turn(15.5, 20)
    lane.room = 9
    assert sender.turn(15.5, 20) == 16
    assert lane.sent == [(0, 10), (1, 11), (2, 12), (3, 13), (4, 14), (5, 15)]


def test_what_has_come_is_read_after_so_many_messages_however_many_are_late() -> None:
    lane = NotingLane()
    sender = Open([lane], evenly(0, 1000))
    assert sender.turn(1, 2) == 1  # at once again
    assert len(lane.sent) == MESSAGES_A_TURN


def test_a_backlog_takes_no_memory() -> None:
    drawn = itertools.count()
    sender = Open([NotingLane(room=0)], (number / 1e9 for number in drawn))
    sender.turn(100, 200)
    assert next(drawn) == 1


@pytest.mark.parametrize(("room", "detail"), [(2, "the server took no more"), (MOST, "the generator is the limit")])
def test_what_was_not_sent_is_told_apart_by_who_was_the_limit(room: int, detail: str) -> None:
    lane = NotingLane(room)
    sender = Open([lane], evenly(0, 1000))
    assert sender.unsent(0) is None
    sender.turn(100, 100)
    lane.room = MOST  # at the end there may be some in any case
    fault = sender.unsent(100)
    assert fault is not None
    assert detail in fault.detail
    assert sender.count_unsent(100) == pytest.approx(100_000 - min(room, MESSAGES_A_TURN), abs=2)


def test_a_lane_that_is_clogged_waits() -> None:
    clogged, free = NotingLane(), NotingLane()
    clogged.is_clogged = True
    Open([clogged, free], evenly(0, 1)).turn(2.5, 10)
    assert (len(clogged.sent), len(free.sent)) == (0, 3)


def test_a_connection_that_takes_no_more_ends_an_open_loop_and_a_closed_one() -> None:
    left, other = NotingLane(), NotingLane()
    closed, open_ = Closed([left, other], 2), Open([left, other], evenly(0, 1))
    left.most, left.room, left.farewell = 0, 0, "goodbye"
    for sender in (closed, open_):
        with pytest.raises(ConnectionEnded, match="goodbye"):
            sender.turn(1, 2)
        assert sender.turn(2, 2) == math.inf  # the end: nothing more is to be sent
    assert left.sent == []


def test_a_closed_loop_that_the_server_allows_fewer_callers_is_none() -> None:
    lanes = [NotingLane(), NotingLane()]
    sender = Closed(lanes, 7)
    lanes[0].most, lanes[1].most = 4, 3
    sender.turn(0, 1)
    assert [len(lane.sent) for lane in lanes] == [4, 3]
    lanes[1].most = 2
    with pytest.raises(TooFewCallers, match="allows 2 on a connection that is to have 3"):
        sender.turn(0, 1)


def test_messages_that_were_not_begun_with_are_sent_again_and_counted() -> None:
    lane = NotingLane()
    for sender in (Closed([lane], 3), Open([lane], evenly(50, 1))):
        lane.sent.clear()
        lane.under_way = 0
        lane.returned += [(7, 0.5), (8, 0.6)]
        assert sender.refused == 2
        sender.turn(1, 1)
        assert lane.sent == [(7, 0.5), (8, 0.6)]
        assert (sender.refused, sender.sent_again) == (0, 2)


def test_only_what_was_answered_while_it_was_measured_is_in_the_rate() -> None:
    outcome = Outcome()
    for meant, at in [
        (0.5, 0.6),
        (0.9, 1.1),
        (1.5, 1.6),
        (1.9, 2.1),
    ]:  # warm-up, across its end, within, across the end
        outcome.count(Answer(meant, at, None), 1, 2)
    outcome.count(Answer(1.5, 1.6, Fault("reset", "")), 1, 2)
    assert (outcome.answered, outcome.all_answered, outcome.latencies.count) == (2, 4, 2)
    assert outcome.faults == {"reset": 1}
