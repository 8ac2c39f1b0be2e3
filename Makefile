# The two commands that matter: `make quickstart` and `make test`. Both set up what they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help quickstart test test-fast check format install clean

help:
	@echo "make quickstart   install what the main job needs, then train, evaluate and talk to a small model"
	@echo "make test         install what the tests need, then run them all"
	@echo "make test-fast    the tests without the slow ones"
	@echo "make check        format, lint and types, as the continuous integration does"
	@echo "make format       rewrite the code as the formatter wants it"
	@echo "make install      everything for development, without running anything"
	@echo "make clean        delete .venv and caches (runs/ stays)"

quickstart: $(VENV)/installed-train
	@echo "==> mobilellm quickstart $(ARGS)"
	@$(BIN)/mobilellm quickstart $(ARGS)

test: $(VENV)/installed-dev
	@echo "==> pytest (all tests)"
	@$(BIN)/python -m pytest

test-fast: $(VENV)/installed-dev
	@$(BIN)/python -m pytest -m "not slow"

check: $(VENV)/installed-dev
	@echo "==> format, lint, types"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(VENV)/installed-dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

install: $(VENV)/installed-dev

# A stamp a set of packages; both are remade when the requirements change.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> installing mobilellm[$*] into $(VENV) (exact versions: constraints.txt)"
	@$(PIP) install --quiet --progress-bar off -c constraints.txt -e ".[$*]"
	@touch $@

$(BIN)/python:
	@echo "==> creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
