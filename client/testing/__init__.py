"""Test a service that uses the SDK, without a server: docs/testing.md tells how.

    >>> from client.testing import FakeServer, digit_png
    >>> with FakeServer() as server:
    ...     server.answers = [3]
    ...     client.classify(digit_png(7), target=server.target).digit
    3

The fake is a gRPC server in a thread of this process. What it is told to do
travels over a real connection, so the client's retries, deadlines and errors
are those of production. It needs neither torch nor anything else than the
client itself; the fixture for pytest is in `client.testing.pytest_plugin`.
"""

from client.testing._answers import Answer, Answers, digit_png
from client.testing._script import Request
from client.testing._server import FakeServer

__all__ = ["Answer", "Answers", "FakeServer", "Request", "digit_png"]
