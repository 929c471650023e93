"""The trainer: MNIST in, `mnist_model.pth` with its manifest and pictures out.

Run it with `python -m trainer`; `--help` is the manual. Knows the domain
(`digits`) and nothing of servers or clients: what it hands over is a file.
"""
