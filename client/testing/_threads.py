"""The threads in which the fake's calls run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any


class CallThreads(futures.Executor):
    """A thread for each call, however many wait at the same time; none keeps the process from ending."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> futures.Future[Any]:
        future: futures.Future[Any] = futures.Future()

        def run() -> None:
            try:
                future.set_result(function(*arguments, **named))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="fake-server-call", daemon=True).start()
        return future
