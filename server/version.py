"""The release of this package."""

from importlib import metadata


def server_version() -> str:
    """The release of this package, `0+unknown` where it runs without being installed."""
    try:
        return metadata.version("mnist-grpc")
    except metadata.PackageNotFoundError:
        return "0+unknown"
