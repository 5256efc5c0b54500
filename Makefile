# SGLang-ARES. `make` alone lists what can be done; every target sets up the environment it needs.

# Python 3.11 for the environment: python3.11, or python3 where that is 3.11.
PYTHON ?= python3.11
# A package index with CPU builds of torch and torchvision, for example
# https://download.pytorch.org/whl/cpu. Empty: the index that pip is configured for, then that one.
TORCH_INDEX ?=
VENV ?= .venv
# More arguments for pytest (make test), for the server (make serve), for the others.
PYTEST_ARGS ?=
ARGS ?=

PY := $(VENV)/bin/python
SET_UP_FROM := requirements/cpu.lock pyproject.toml setup.py tools/setup_venv.py
READY := $(VENV)/.ready-$(shell cat $(SET_UP_FROM) | sha256sum | cut -c1-16)
SOURCES := python kernels test benchmark tools setup.py
LINTED = $(wildcard $(SOURCES))
# pytest ends with 5 when it selected nothing; a selection given by hand may do so in one suite.
NONE_SELECTED_IS_FINE = $(if $(strip $(PYTEST_ARGS)),|| test $$? -eq 5)
# The filter keeps SWIG-made modules from printing after pytest's summary when Python exits.
PYTEST = $(PY) -W 'ignore:builtin type:DeprecationWarning' -m pytest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

.PHONY: help
help: ## this list
	@echo "SGLang-ARES: make TARGET [NAME=VALUE ...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON=$(PYTHON)  VENV=$(VENV)  TORCH_INDEX=$(TORCH_INDEX)  PYTEST_ARGS=$(PYTEST_ARGS)  ARGS=$(ARGS)"

.PHONY: venv
venv: $(READY) ## the CPU environment in .venv (3.6 GB); continues after an interruption

$(READY): $(SET_UP_FROM)
	@python=; for candidate in $(PYTHON) python3; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then \
	    python=$$candidate; break; fi; done; \
	if test -z "$$python"; then \
	  echo "Python 3.11 is needed: neither '$(PYTHON)' nor 'python3' is one. Name it: make venv PYTHON=/path/to/python3.11" >&2; \
	  exit 1; fi; \
	exec "$$python" tools/setup_venv.py --venv "$(VENV)" --torch-index "$(TORCH_INDEX)" --stamp "$@"

.PHONY: demo
demo: $(READY) ## a cluster on this machine under load, with and without moves: build/demo*.json, build/demo*.png
	@$(PY) -m sglang_ares.demo $(ARGS)

.PHONY: serve
serve: $(READY) ## the server in the foreground; its flags in ARGS="..."
	@$(PY) -m sglang_ares.launch_server $(ARGS)

.PHONY: test
test: $(READY) ## everything CI checks: lint, types, unit and integration tests
	@$(MAKE) lint
	@$(MAKE) test-unit
	@$(MAKE) test-integration

.PHONY: test-unit
test-unit: $(READY) ## unit tests; a selection in PYTEST_ARGS="-k ..."
	@echo "== unit tests"
	@$(PYTEST) test/unit $(PYTEST_ARGS) $(NONE_SELECTED_IS_FINE)

.PHONY: test-integration
test-integration: $(READY) ## tests with real workers
	@echo "== integration tests"
	@$(PYTEST) test/integration $(PYTEST_ARGS) $(NONE_SELECTED_IS_FINE)

.PHONY: test-exactness
test-exactness: $(READY) ## 275 requests, each moved three times, against unmoved ones (a third of it is in make test)
	@$(PYTEST) test/integration/test_exactness.py --full $(PYTEST_ARGS)

.PHONY: soak
soak: $(READY) ## five minutes of random faults under load; moves only: ARGS="--faults none --moves 1000"
	@PYTHONPATH=test $(PY) test/soak.py $(ARGS)

.PHONY: lint
lint: $(READY) ## ruff and mypy, changing nothing
	@echo "== ruff check"
	@$(PY) -m ruff check $(LINTED)
	@echo "== ruff format --check"
	@$(PY) -m ruff format --check $(LINTED)
	@echo "== mypy"
	@$(PY) -m mypy

.PHONY: format
format: $(READY) ## let ruff fix and format the sources
	@$(PY) -m ruff check --fix $(LINTED)
	@$(PY) -m ruff format $(LINTED)

.PHONY: bench-upstream
bench-upstream: $(READY) ## compare with upstream's own prefill/decode disaggregation behind its router
	@$(PY) benchmark/bench_vs_upstream_pd.py $(ARGS)

.PHONY: bench-migration
bench-migration: $(READY) ## what moving a request costs: its pause, the others' steps, KV sent (about half an hour)
	@$(PY) benchmark/bench_migration.py $(ARGS)

.PHONY: train-demo-model
train-demo-model: $(READY) ## train the embedded default model anew (about 20 minutes on two cores)
	@$(PY) -m sglang_ares.demo_model.train $(ARGS)

.PHONY: docs
docs: $(READY) ## write the parts of docs/ that are generated from the code
	@$(PY) -m sglang_ares.docgen $(ARGS)

.PHONY: mooncake
mooncake: $(READY) ## add the Mooncake transfer engine (needs libibverbs1, librdmacm1 and libnuma1)
	@$(PY) -m pip install --no-deps --only-binary=:all: mooncake-transfer-engine-non-cuda==0.3.13.post1

.PHONY: hooks
hooks: $(READY) ## run the checks before every git commit
	@$(PY) -m pip install --only-binary=:all: 'pre-commit>=4'
	@$(PY) -m pre_commit install

.PHONY: clean
clean: ## remove what was built, and the caches; not the environment
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .benchmarks .hypothesis
	find python kernels test benchmark tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

.PHONY: clean-venv
clean-venv: ## remove the environment
	rm -rf "$(VENV)"
