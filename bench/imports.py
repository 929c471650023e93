"""`python -m bench.imports`: what a server in Python with torch and gRPC cannot start without, and nothing else."""

import sys

import grpc
import torch

if __name__ == "__main__":
    print(f"serving on nothing, with grpc {grpc.__version__} and torch {torch.__version__}", flush=True)
    sys.stdin.read()
