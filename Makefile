# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COMPILE := $(BIN)/pip-compile --quiet --no-emit-index-url --no-emit-trusted-host --no-emit-find-links \
	--strip-extras --generate-hashes --allow-unsafe
SYMBOL ?= AAPL

.DEFAULT_GOAL := help
.PHONY: help demo test check serve lock clean

help:  ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1	/'

$(VENV)/.base: requirements.lock pyproject.toml
	@echo "Setting up $(VENV) from requirements.lock ..."
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; name one with PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.base
	@echo "Adding what the tests need from requirements-dev.lock ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

demo: $(VENV)/.base  ## Train AAPL on the embedded real prices and backtest it
	$(BIN)/python -m training.train_gbm $(SYMBOL) --source sample --overwrite
	$(BIN)/python run_backtest.py --symbol $(SYMBOL) --source sample

check: $(VENV)/.dev  ## Lint, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check  ## Everything that the continuous integration runs
	$(BIN)/python -m pytest --cov --cov-report=term -n 2 --dist loadfile

serve: $(VENV)/.base  ## Serve the API on 127.0.0.1:8000
	$(BIN)/python app.py

lock: $(VENV)/.dev  ## Resolve the locks anew
	$(BIN)/python -m pip install --quiet pip-tools
	$(COMPILE) --extra sample --extra lstm --extra postgres --extra dev -o requirements-dev.lock pyproject.toml
	$(COMPILE) --extra sample -c requirements-dev.lock -o requirements.lock pyproject.toml

clean:  ## Remove what can be made again (models and results stay)
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage
