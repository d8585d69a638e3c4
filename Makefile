# `make demo` and `make test` do all the set-up on a machine with Python >= 3.11 and a package index:
# a virtual environment in .venv, pinned versions with torch first, the package installed editable.
# A second call does not set up again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
WORKERS ?= 2

export OMP_NUM_THREADS ?= 2

.PHONY: demo test check bench bench-train audit format clean help

help:
	@echo "make demo    train on the digits, generate images with six solvers, print the figures"
	@echo "make test    run the tests           make check   ruff, mypy, import directions"
	@echo "make bench   side-by-side timings    make format  format the code    make clean"
	@echo "make bench-train  images/s in training and sampling, beside diffusers and ddpm-pytorch"
	@echo "make audit   orders and laws of the samplers of diffusers, k-diffusion and azula, measured"

demo: $(VENV)/.package
	OMP_WAIT_POLICY=passive $(BIN)/sdeflow demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

check: $(VENV)/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_imports.py

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/sde_throughput.py --quick

bench-train: $(VENV)/.peers
	PYTHONPATH=$(VENV)/peers OMP_NUM_THREADS=1 \
	  $(BIN)/python benchmarks/train.py --out benchmarks/results/train.md

audit: $(VENV)/.peers
	PYTHONPATH=$(VENV)/peers OMP_NUM_THREADS=1 \
	  $(BIN)/python benchmarks/peer_audit.py --out benchmarks/results/peer_audit.md

format: $(VENV)/.check
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .hypothesis

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sdeflow needs Python >= 3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "pip>=25.1"
	@touch $@

# torch first, alone: what is installed after it then accepts the build that is there.
$(VENV)/.package: pyproject.toml constraints.txt | $(VENV)/.python
	@echo "setting up $(VENV) (a few minutes, once)"
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable ".[images]"
	@touch $@

$(VENV)/.test: $(VENV)/.package
	$(PIP) install --constraint constraints.txt --group test
	@touch $@

$(VENV)/.bench: $(VENV)/.package
	$(PIP) install --constraint constraints.txt --group bench
	@touch $@

# Beside the environment, not in it, and without dependencies: those bring torchvision.
$(VENV)/.peers: $(VENV)/.package
	$(PIP) install --constraint constraints.txt --no-deps --target $(VENV)/peers --upgrade --group peers
	@touch $@

$(VENV)/.check: $(VENV)/.package
	$(PIP) install --constraint constraints.txt --group check
	@touch $@
