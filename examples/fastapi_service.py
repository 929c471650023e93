from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, UploadFile

from client import AsyncClient, InvalidImageError, MnistGrpcError


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncClient() as app.state.digits:  # of MNIST_GRPC_TARGET
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/digits")
async def read(image: UploadFile) -> dict[str, float]:
    try:
        prediction = await app.state.digits.classify(await image.read())
    except MnistGrpcError as error:
        raise HTTPException(422 if isinstance(error, InvalidImageError) else 503, str(error)) from error
    return {"digit": prediction.digit, "confidence": prediction.confidence}
