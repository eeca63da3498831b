# `make demo` and `make test` need Python 3.11 and git, nothing else: the first call makes .venv and installs into it.
#   PYTHON          the interpreter .venv is made from:   make test PYTHON=python3.12
#   PIP_CONSTRAINT  pip's own variable, to pin versions:  PIP_CONSTRAINT=pins.txt make demo
#   ARGS            options of the recipe for the demo:   make demo ARGS="--sft.num_train_epochs 2 --teacher.epochs 3"
#   JOBS            processes that tests run in:           make test JOBS=8
#   SITE            the site with the docs of all releases: make docs-release SITE=../pages
PYTHON ?= python3
JOBS ?= 2
SITE ?= docs/_build/site
BIN := .venv/bin
STAMP := .venv/.installed
LOWEST := .venv-lowest

# `make test-lowest` runs the tests in which third-party packages do the work; what is left out is our own arithmetic
# (catalog, losses, metrics, samplers, teachers) and what takes long (convergence, most of pipeline and distributed).
#   policy, test_recommender   transformers (backbones, masks, caches), peft, scipy
#   trainer                    trl, accelerate, peft, datasets, safetensors, hypothesis
#   data, semantic_ids         pyarrow, tokenizers, scikit-learn, numpy
#   test_language_model        trl's SFT, peft and bitsandbytes through all stages
#   test_tracking              tensorboard
#   cli                        rich, tqdm, PyYAML, matplotlib, huggingface-hub
#   serving                    fastapi, pydantic, uvicorn, httpx2
#   test_example, ZeRO-3       deepspeed, started by accelerate
LOWEST_TESTS := tests/policy tests/test_recommender.py tests/trainer tests/data tests/semantic_ids tests/cli tests/serving \
	tests/pipeline/test_language_model.py tests/pipeline/test_tracking.py --ignore=tests/trainer/test_total_variation.py \
	"tests/distributed/test_example.py::test_every_engine_gives_the_results_of_one_process[zero3]"

# A file's tests stay in one process, so that what they share is made once; files start in the order of their names.
IN_PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-rest test-all test-lowest lint docs docs-release clean

help:
	@echo "make demo   train, fine-tune and compare a small recommender on the synthetic shop (CPU, a few minutes)"
	@echo "make test   run the tests: every loss, reward, sampler, backbone and engine (minutes)"
	@echo "make test-rest   run the other combinations"
	@echo "make test-all   run both"
	@echo "make test-lowest   run some of them with the oldest versions that setup.cfg allows"
	@echo "make lint   check style and format with ruff, and the types of the core with basedpyright"
	@echo "make docs   build the documentation into docs/_build/html, with warnings as errors"
	@echo "make docs-release   build it and keep it under its version in SITE, next to earlier releases"
	@echo "make clean  remove both environments and the documentation"

# All values are given, so that accelerate neither warns nor reads a configuration of this machine. One thread: a second
# one gains little with a model this small, and costs much where its core is busy.
demo: $(STAMP)
	$(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $${OMP_NUM_THREADS:-1} examples/gflowgr_amazon.py $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(IN_PARALLEL)

test-rest: $(STAMP)
	$(BIN)/python -m pytest $(IN_PARALLEL) -m slow

test-all: $(STAMP)
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not exhaustive"

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest $(IN_PARALLEL) -m "" $(LOWEST_TESTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# -E reads every page anew: what is in the library may have changed, and pages are made of it.
docs: .venv/.docs-installed
	rm -rf docs/_build/html
	$(BIN)/python -m sphinx --quiet -E --fail-on-warning --keep-going -c docs . docs/_build/html
	@echo "docs/_build/html/index.html"

docs-release: docs
	$(BIN)/python tools/keep_docs.py docs/_build/html $(SITE) $$($(BIN)/gflowtrl --version)
	@echo "$(SITE)/index.html"

clean:
	rm -rf .venv $(LOWEST) docs/_build

# $(call make_venv,FOLDER)
define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gflowtrl needs Python 3.11 or newer, and '$(PYTHON)' is not one. Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(1) || \
		{ echo "'$(PYTHON) -m venv $(1)' failed; on Debian and Ubuntu install the package python3-venv first." >&2; exit 1; }
endef

INSTALL_FAILED = { echo "Installing gflowtrl into $(@D) failed; pip's message is above. 'make clean' starts afresh." >&2; exit 1; }

# The stamp is older than setup.cfg when the requirements may have changed: only then is anything installed again.
$(STAMP): setup.cfg pyproject.toml
	$(call make_venv,.venv)
	@echo "Installing gflowtrl and what it needs into .venv, once; this takes some minutes ..."
	@$(BIN)/python -m pip install --quiet --editable '.[dev]' || $(INSTALL_FAILED)
	@touch $@

# pip reads all files that PIP_CONSTRAINT names, with spaces between them: the caller's own hold as well.
$(LOWEST)/.installed: setup.cfg pyproject.toml tools/lowest_versions.py
	$(call make_venv,$(LOWEST))
	@$(LOWEST)/bin/python tools/lowest_versions.py > $(LOWEST)/constraints.txt
	PIP_CONSTRAINT="$$PIP_CONSTRAINT $(LOWEST)/constraints.txt" \
		$(LOWEST)/bin/python -m pip install --quiet --editable '.[test]' || $(INSTALL_FAILED)
	@touch $@

.venv/.docs-installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[docs]' || $(INSTALL_FAILED)
	@touch $@
