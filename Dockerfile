# syntax=docker/dockerfile:1
#
# The server, ready to run:
#
#   docker build -t mnist-grpc .
#   docker run --rm -p 50051:50051 mnist-grpc
#
# Settings are given as variables (-e MNIST_GRPC_PORT=6000), which the health
# check sees, too. The grace of 8 s lies within the 10 s of `docker stop`.
#
# TORCH is what pip installs as torch. Plain `torch` brings the CUDA build on
# Linux (several GB). For a small image give the CPU build, with the index that
# PyTorch's installation page names for it:
#
#   docker build --build-arg TORCH="torch --index-url <the CPU index>" -t mnist-grpc .
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG TORCH=torch
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/mnist-grpc
# Before the sources, so that a change of ours does not install torch again.
RUN /opt/mnist-grpc/bin/pip install ${TORCH}
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY digits digits
COPY client client
COPY server server
COPY trainer trainer
RUN /opt/mnist-grpc/bin/pip install '.[server]'

FROM python:${PYTHON}-slim
RUN useradd --system --no-create-home --uid 10001 digits
COPY --from=build /opt/mnist-grpc /opt/mnist-grpc
ENV PATH=/opt/mnist-grpc/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MNIST_GRPC_HOST=0.0.0.0 \
    MNIST_GRPC_PORT=50051
USER digits
EXPOSE 50051
# SIGTERM reaches the server itself (exec form, no shell) and drains it.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
    CMD ["sh", "-c", "mnist-grpc health --target localhost:$MNIST_GRPC_PORT --timeout 3"]
ENTRYPOINT ["mnist-grpc-server"]
