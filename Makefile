# Every target sets up what it needs on a bare machine: Python >= 3.11 is all that must be there.
PYTHON ?= python3
# What to install as torch. On a machine with an NVIDIA GPU: make setup TORCH='torch>=2.11'
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test test-full chaos lint bench clean

help:
	@echo "make setup      make .venv with the lockstep command"
	@echo "make demo       run the demo model split over two ranks, and compare with one"
	@echo "make test       set up and run the tests (a few minutes)"
	@echo "make test-full  the whole matrices (about an hour)"
	@echo "make chaos      the tests that kill and stop real processes, all of them"
	@echo "make lint       ruff and mypy"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "lockstep needs Python 3.11 or newer; this is %s. Try: make setup PYTHON=python3.12" % sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch goes first: any range met later would pull the newest build with gigabytes of CUDA
	@echo "installing torch ..." && $(BIN)/python -m pip install -q $(TORCH)
	@echo "installing lockstep ..." && $(BIN)/python -m pip install -q $(if $(filter torch==2.13.0,$(TORCH)),-c constraints.txt) -e '.[dev]'
	@echo "compiling the CPU kernels ..." && $(BIN)/python -m lockstep.kernels.build
	@touch $@

demo: $(READY)
	@$(BIN)/lockstep demo

test: $(READY)
	$(BIN)/python -m pytest tests -m "not full and not cuda" -n 2 --dist loadfile

test-full: $(READY)
	$(BIN)/python -m pytest tests -m "not cuda" -n 2 --dist loadfile

chaos: $(READY)
	$(BIN)/python -m pytest tests/chaos -m "not cuda"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
