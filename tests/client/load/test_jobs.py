"""What is sent: images in no order, and no more messages than memory has room for."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("hpack")

from client.load.images import IMAGES, images, labels
from client.load.jobs import KINDS, MESSAGES_BYTES, Job, messages_of
from client.testing._answers import nearest_sample
from digits.preprocessing import PIXELS


def test_images_show_what_their_labels_say() -> None:
    assert [nearest_sample(pixels) for pixels in images()] == labels()


def test_an_answer_that_is_some_places_off_is_another_digit() -> None:
    same = [float((np.array(labels()) == np.roll(labels(), places)).mean()) for places in range(1, IMAGES)]
    assert max(same) < 0.2  # by chance a tenth


def test_all_images_are_different() -> None:
    assert len({pixels.tobytes() for pixels in images()}) == IMAGES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "distinct"), [(1, 256), (256, 256), (4096, 20), (50_000, 2)])
def test_messages_are_different_and_take_no_more_memory_than_said(kind: str, count: int, distinct: int) -> None:
    messages = messages_of(kind, count)
    assert len(set(messages)) == len(messages) == distinct
    assert sum(map(len, messages)) < MESSAGES_BYTES * 1.01 or distinct == 2
    assert len(messages[0]) >= count * PIXELS
    messages_of.cache_clear()


def test_messages_go_round_with_their_digits() -> None:
    job = Job("classify", 4096, labels())
    assert len(job.messages) == len(job.expected) == IMAGES
    assert job.messages[21] is job.messages[1] is not job.messages[2]
    assert job.expected[21] == job.expected[1] != job.expected[2]
    assert job.expected[1][:3] == labels()[7:10]


def test_the_ceiling_is_measured_with_the_same_messages() -> None:
    assert Job("classify", 3, labels()).messages[0] is Job("classify", 3, None).messages[0]
