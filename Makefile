# `make demo` and `make test` need Python 3.11 and git, nothing else: the first call makes .venv and installs into it.
#   PYTHON          the interpreter .venv is made from:   make test PYTHON=python3.12
#   PIP_CONSTRAINT  pip's own variable, to pin versions:  PIP_CONSTRAINT=pins.txt make demo
#   ARGS            options of the recipe for the demo:   make demo ARGS="--sft.num_train_epochs 2 --teacher.epochs 3"
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help demo test lint docs clean

help:
	@echo "make demo   train, fine-tune and compare a small recommender on the synthetic shop (CPU, a few minutes)"
	@echo "make test   run the tests"
	@echo "make lint   check style and format with ruff"
	@echo "make docs   build the documentation into docs/_build/html, with warnings as errors"
	@echo "make clean  remove .venv and the documentation"

# All values are given, so that accelerate neither warns nor reads a configuration of this machine. One thread: a second
# one gains little with a model this small, and costs much where its core is busy.
demo: $(STAMP)
	$(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $${OMP_NUM_THREADS:-1} examples/gflowgr_amazon.py $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# -E reads every page anew: what is in the library may have changed, and pages are made of it.
docs: .venv/.docs-installed
	rm -rf docs/_build/html
	$(BIN)/python -m sphinx --quiet -E --fail-on-warning --keep-going -c docs . docs/_build/html
	@echo "docs/_build/html/index.html"

clean:
	rm -rf .venv docs/_build

# The stamp is older than setup.cfg when the requirements may have changed: only then is anything installed again.
$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gflowtrl needs Python 3.11 or newer, and '$(PYTHON)' is not one. Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv .venv || \
		{ echo "'$(PYTHON) -m venv .venv' failed; on Debian and Ubuntu install the package python3-venv first." >&2; exit 1; }
	@echo "Installing gflowtrl and what it needs into .venv, once; this takes some minutes ..."
	@$(BIN)/python -m pip install --quiet --editable '.[dev]' || \
		{ echo "Installing gflowtrl into .venv failed; pip's message is above. 'make clean' starts afresh." >&2; exit 1; }
	@touch $@

.venv/.docs-installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[docs]' || \
		{ echo "Installing what builds the documentation failed; pip's message is above." >&2; exit 1; }
	@touch $@
