# Every target sets up what it needs: a virtual environment with the locked dependencies, the typed stubs, the Cython extensions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
EVENT ?=
JSON ?=
ARGS ?=
WORKERS ?= 5
BUILD_INPUTS := setup.py pyproject.toml client/setup.py client/stubs.py client/pyproject.toml $(shell find proto wallet_core -name '*.proto' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.pxi' -o -name '*.h')

# Every process would compile all of its modules again: a quarter of its start, and half of the time that the tests take to be collected.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo up test lint bench loadtest lock clean setup
.DEFAULT_GOAL := help

help:
	@echo 'make demo [EVENT=file.json] [JSON=1]   one checkout from JSON to a payout, then stop'
	@echo 'make up                                keep the platform running, data in .ducat/'
	@echo 'make test [WORKERS=5] [ARGS=...]       the whole test suite, in so many processes'
	@echo 'make lint                              format, types, imports, protos'
	@echo 'make loadtest                          one headless minute of locust, HTML report'
	@echo 'make bench [ARGS="--scenario NAME"]    wallet benchmarks'

demo: setup
	@$(BIN)/ducat demo $(if $(EVENT),--event '$(EVENT)') $(if $(JSON),--json)

up: setup
	@$(BIN)/ducat up $(ARGS)

test: setup
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: setup
	@$(BIN)/python -m pytest tests/test_source.py $(ARGS)

loadtest: setup
	@$(BIN)/ducat loadtest $(ARGS)

bench: setup
	@$(BIN)/ducat bench wallet $(ARGS)

setup: $(VENV)/.built

$(VENV)/.synced: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "ducat needs Python 3.11 or newer, this is %d.%d; fix: make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@echo 'installing the locked dependencies'
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv pip sync --quiet --require-hashes requirements.lock
	@touch $@

$(VENV)/.built: $(VENV)/.synced $(BUILD_INPUTS)
	@command -v cc >/dev/null || command -v gcc >/dev/null || test -n "$$CC" || VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet ziglang
	@echo 'building the stubs and the wallet core (about half a minute the first time)'
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable client --editable .
	@touch $@

lock:
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	  --extra telemetry --extra s3 --extra loadtest --no-emit-package ducat-client --group build --group dev pyproject.toml --output-file requirements.lock

clean:
	@rm -rf build dist client/build client/dist $(VENV) ducat/*/v1 *.egg-info client/*.egg-info && find . -name '*.so' -delete
