"""Read handwritten digits with an mnist-grpc server.

    >>> import client
    >>> client.classify("7.png")
    Prediction(digit=7, confidence=...)
    >>> with client.Client("localhost:50051") as digits:
    ...     [prediction.digit for prediction in digits.classify_batch(["3.png", "7.png"])]
    [3, 7]

An image is a path, the bytes of a file, a binary file object, a PIL image, or a
NumPy array: `uint8[h, w]`, `uint8[h, w, 3|4]` or floats in [0, 1]. Importing
this package loads neither torch nor anything of the server.
"""

from client._async import AsyncClient
from client._channel import TLS
from client._default import classify, explain
from client._errors import (
    DeadlineExceededError,
    InvalidImageError,
    MnistGrpcError,
    OverloadedError,
    OvertakenError,
    ServerError,
    UnauthenticatedError,
    UnavailableError,
)
from client._request_id import request_id
from client._sync import Client
from client._types import Image, Model, Prediction

__all__ = [
    "TLS",
    "AsyncClient",
    "Client",
    "DeadlineExceededError",
    "Image",
    "InvalidImageError",
    "MnistGrpcError",
    "Model",
    "OverloadedError",
    "OvertakenError",
    "Prediction",
    "ServerError",
    "UnauthenticatedError",
    "UnavailableError",
    "classify",
    "explain",
    "request_id",
]
