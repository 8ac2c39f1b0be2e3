# The two commands that matter: `make quickstart` and `make test`. Both set up what they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests run in as many processes, a file in one of them, each with one thread.
TEST_PROCESSES ?= auto
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Read by any Python, so in words that any Python knows.
REFUSE_OLD_PYTHON := import sys; v = sys.version_info; v >= (3, 11) or sys.exit("make: %s is Python %d.%d and 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.11 (after: rm -rf $(VENV))" % (sys.argv[1], v[0], v[1]))

.PHONY: help quickstart test test-all check format install clean

help:
	@echo "make quickstart   install what the main job needs, then train, evaluate and talk to a small model"
	@echo "make test         install what the tests need, then run them: a few minutes"
	@echo "make test-all     the slow ones too, as the continuous integration does"
	@echo "make check        format, lint and types, as the continuous integration does"
	@echo "make format       rewrite the code as the formatter wants it"
	@echo "make install      everything for development, without running anything"
	@echo "make clean        delete .venv and caches (runs/ stays)"

quickstart: $(VENV)/installed-train
	@echo "==> mobilellm quickstart $(ARGS)"
	@$(BIN)/mobilellm quickstart $(ARGS)

test: $(VENV)/installed-dev
	@echo "==> pytest (without the slow ones; make test-all runs those too)"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(TEST_PROCESSES) --maxprocesses 8 --dist loadfile

test-all: $(VENV)/installed-dev
	@echo "==> pytest (all tests)"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --hypothesis-profile whole -n $(TEST_PROCESSES) --maxprocesses 8 --dist loadfile

check: $(VENV)/installed-dev
	@echo "==> format, lint, types"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(VENV)/installed-dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

install: $(VENV)/installed-dev

# A stamp a set of packages; both are remade when the requirements change. pip is not quiet: torch alone is
# hundreds of megabytes (gigabytes where the index serves CUDA builds), and a silent wait looks like a fault.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python -c '$(REFUSE_OLD_PYTHON)' $(VENV)
	@echo "==> installing mobilellm[$*] into $(VENV) (exact versions: constraints.txt)"
	@echo "    The first time downloads torch and more, which takes minutes; README, \"Install\", tells how to get the small CPU build."
	@$(PIP) install -c constraints.txt -e ".[$*]"
	@touch $@

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { echo "make: $(PYTHON): not found; install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c '$(REFUSE_OLD_PYTHON)' "$(PYTHON)"
	@echo "==> creating $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo "make: no $(VENV) could be made; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
