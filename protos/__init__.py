"""The contract: `.proto` sources, and beside them the code that `make proto` generates."""
