RECIPE ?= recipes/quickstart.yaml
ARGS ?=
PYTHON ?= python3
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
# A file's tests share what it made, so they stay in one process. In their own order: sorted by the
# number of tests, the files with few long ones would come last and leave a worker idle.
PARALLEL := --numprocesses auto --dist loadfile --no-loadscope-reorder
LOWEST := tests/unit $(addprefix tests/integration/test_,adapter_io.py checkpoint.py \
	experiment.py forward.py generate.py merge.py methods.py plan.py training.py)

.PHONY: help experiment plan demo ready test test-all test-lowest zoo bench bench-generate calibration scaling gpu-check plan-check faults check format clean

help:  ## List the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'
	@echo
	@echo "  make experiment RECIPE=recipes/tinyllama-dolly.yaml ARGS='training.device=cuda'"

experiment: .venv/installed  ## Run an experiment: RECIPE=… (default: quickstart), ARGS='key=value …'.
	$(BIN)/slm-lora experiment $(RECIPE) $(ARGS)

plan: .venv/installed  ## Show what an experiment would do, and train nothing.
	$(BIN)/slm-lora experiment $(RECIPE) --plan $(ARGS)

demo: .venv/installed-serve  ## Serve the last experiment's adapters: a page and an OpenAI-style API.
	$(BIN)/slm-lora serve $(ARGS)

ready: check  ## Before a commit: format, lint, types, imports, generated docs, unit tests.
	$(BIN)/python -m pytest $(PARALLEL) tests/unit

test: .venv/installed-dev  ## Run the tests.
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow'

test-all: .venv/installed-clients  ## The tests with every extra and with clients of others.
	$(BIN)/python -m pytest $(PARALLEL)

test-lowest: .venv-lowest/installed  ## The core of the tests with the lowest versions that pyproject.toml allows.
	.venv-lowest/bin/python -m pytest $(PARALLEL) -m 'not slow' $(LOWEST)

zoo: .venv/installed  ## Small models of every family against transformers and PEFT: ARGS='llama gpt2'.
	$(BIN)/python benchmarks/zoo.py $(ARGS)

bench: .venv/installed requirements-bench.txt  ## Measure speed and memory against TRL and the naive script: ARGS='--data dolly.jsonl'.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-generate: .venv/installed  ## Measure replies against transformers' generate: ARGS='--adapter adapter/…'.
	$(BIN)/python benchmarks/generate.py $(ARGS)

calibration: .venv/installed  ## Train sixteen seeds of one cell, and test the statistics on planted truths over them.
	$(BIN)/slm-lora experiment recipes/calibration.yaml $(ARGS)
	$(BIN)/python benchmarks/calibration

scaling: .venv/installed  ## Measure 1, 2 and 4 processes, and simulate more.
	$(BIN)/python benchmarks/scaling.py $(ARGS)

gpu-check: .venv/installed  ## On a GPU: losses against a CPU's, repeatability, 4 bits, speed, memory.
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

plan-check: .venv/installed-clients  ## What --plan predicts, against runs.
	$(BIN)/python benchmarks/plan_check.py $(ARGS)

faults: .venv/installed  ## Kill, stop, fill the disk, corrupt files, hundreds of times; compare with a run left alone.
	$(BIN)/python benchmarks/faults/campaign.py $(ARGS)

check: .venv/installed-dev .venv/installed-serve  ## Formatter, linter, type checker, import contract, generated docs.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/make_recipe_reference.py --check

format: .venv/installed-dev  ## Format the code and make the recipe reference again.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python docs/make_recipe_reference.py

clean:  ## Remove the environment and caches (results and adapters stay).
	rm -rf .venv .venv-lowest build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("slm-lora needs Python 3.11 or newer; set PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv/installed-serve: .venv/installed requirements-serve.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-serve.txt
	touch $@

.venv/installed-clients: .venv/installed-dev .venv/installed-serve requirements-clients.txt requirements-extras.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-clients.txt -r requirements-extras.txt
	touch $@

.venv-lowest/installed: requirements-lowest.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-lowest.txt
	grep -E '^(pytest|hypothesis|execnet|iniconfig|pluggy|sortedcontainers)' requirements-dev.txt > .venv-lowest/tests.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-lowest/tests.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@
