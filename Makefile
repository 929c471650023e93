# One verb a task; CI calls the same ones. `make run` and `make test` set up all
# they need in .venv, on a machine that has nothing but Python 3.11 or newer.
#
#   make run ARGS="--port 6000"             flags of mnist-grpc-server
#   make test ARGS="tests/client -k batch"  arguments of pytest
#   make run TORCH="torch==2.13.0"          a build of torch to install first (pinned with ==),
#                                           with pip's options for its index where it has one
#   make bench-peers PEERS="ours triton"    these environments and peers alone
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
ARGS ?=
PEERS ?=
BIN := $(VENV)/bin

.NOTPARALLEL:
.PHONY: run test lint format proto train evaluate bench bench-peers client-range open-inference-clients \
	foreign-clients clean

run: $(VENV)/.server
	@exec $(BIN)/mnist-grpc-server $(ARGS)

test: $(VENV)/.dev
	$(BIN)/pytest -n auto $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && ../$(BIN)/buf lint

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto:
	scripts/proto

train: $(VENV)/.train
	$(BIN)/python -m trainer $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/python -m bench $(ARGS)

# Ours beside other serving systems, in environments of their own in .venv-peers (docs/peers.md).
bench-peers: $(VENV)/.dev
	TORCH="$(TORCH)" scripts/bench-peers $(BIN)/python $(PEERS)
	$(BIN)/python -m bench.peers $(if $(PEERS),--only $(filter-out ours,$(PEERS))) $(ARGS)

# The client's tests with the oldest versions that pyproject.toml claims.
client-range: $(VENV)/.dev
	scripts/client-range $(BIN)/python

# Triton's and KServe's own clients against the server.
open-inference-clients: $(VENV)/.dev
	scripts/open-inference-clients $(BIN)/python

# These, Node's and h2load, which have to be there; no test may be skipped.
foreign-clients: $(VENV)/.dev
	scripts/foreign-clients $(BIN)/python

clean:
	rm -rf $(VENV) .venv-*

$(VENV)/.server: EXTRAS = server
$(VENV)/.train: EXTRAS = server,train
$(VENV)/.dev: EXTRAS = server,train,dev
$(VENV)/.server $(VENV)/.train $(VENV)/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(BIN)/pip install $(TORCH))
	$(BIN)/pip install -e '.[$(EXTRAS)]'
	@touch $@
