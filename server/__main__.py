"""`python -m server` is `mnist-grpc-server`."""

from server.cli import script

if __name__ == "__main__":
    script()
