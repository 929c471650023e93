"""`python -m client` is `mnist-grpc`."""

from client.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
