"""What the model has computed since it is being served, as Triton's tools ask for it (ModelStatistics).

Counts what the batcher tells, whichever contract the rows came by. A request is
an item of the batcher there: one that is larger than a batch counts as several.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from protos.inference import grpc_inference_service_pb2 as pb
from server.observer import Observer


class _Times:
    """A number of times, and how long they took together."""

    __slots__ = ("count", "seconds")

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def add(self, count: int, seconds: float) -> None:
        self.count += count
        self.seconds += seconds

    def message(self) -> pb.StatisticDuration:
        return pb.StatisticDuration(count=self.count, ns=int(self.seconds * 1e9))


class Statistics(Observer):
    """Counts from zero for each model that is served."""

    def __init__(self) -> None:
        self._start_over()

    def _start_over(self) -> None:
        self._success, self._fail, self._queue, self._compute = _Times(), _Times(), _Times(), _Times()
        self._batches: defaultdict[int, _Times] = defaultdict(_Times)  # by rows
        self._last_inference = 0.0  # on the wall clock

    def model_served(self, version: str) -> None:
        self._start_over()

    def rejected(self, reason: str, rows: int) -> None:
        self._fail.add(1, 0.0)

    def dropped(self, reason: str, rows: int) -> None:
        self._fail.add(1, 0.0)

    def batch_ended(
        self, rows: int, tokens: Sequence[Any], queue_seconds: Sequence[float], compute_seconds: float, failed: bool
    ) -> None:
        items = len(queue_seconds)
        waited = sum(queue_seconds)
        computed = items * compute_seconds
        if failed:
            self._fail.add(items, waited + computed)
            return
        self._success.add(items, waited + computed)
        self._queue.add(items, waited)
        self._compute.add(items, computed)
        self._batches[rows].add(1, compute_seconds)
        self._last_inference = time.time()

    def message(self, name: str, version: str) -> pb.ModelStatistics:
        """The counts, as those of the model with this name and version."""
        part_of_compute = pb.StatisticDuration(count=self._compute.count)
        return pb.ModelStatistics(
            name=name,
            version=version,
            last_inference=int(self._last_inference * 1000),
            inference_count=sum(rows * batches.count for rows, batches in self._batches.items()),
            execution_count=sum(batches.count for batches in self._batches.values()),
            inference_stats=pb.InferStatistics(
                success=self._success.message(),
                fail=self._fail.message(),
                queue=self._queue.message(),
                compute_input=part_of_compute,
                compute_infer=self._compute.message(),
                compute_output=part_of_compute,
            ),
            batch_stats=[
                pb.InferBatchStatistics(
                    batch_size=rows,
                    compute_input=pb.StatisticDuration(count=batches.count),
                    compute_infer=batches.message(),
                    compute_output=pb.StatisticDuration(count=batches.count),
                )
                for rows, batches in sorted(self._batches.items())
            ],
        )
