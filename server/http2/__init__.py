"""gRPC over an HTTP/2 connection of the event loop's own, past Python gRPC: `--transport asgi`."""
