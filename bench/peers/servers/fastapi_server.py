"""FastAPI: pixels in the body, probabilities in the answer, a forward for each request."""

from __future__ import annotations

from digit_network import Digits
from fastapi import FastAPI, Request, Response

app = FastAPI()
digits = Digits()


@app.post("/classify")
async def classify(request: Request) -> Response:
    return Response(digits.of_bytes(await request.body()), media_type="application/octet-stream")
