"""The service: `mnist-grpc-server`. Importing the package does nothing."""
