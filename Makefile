# make demo       train a small Vim on real images, evaluate it, print the result
# make test       lint, types and the test suite
# make test-long  the slowest tests, which the suite leaves out: a step of
#                 every single recipe, say
#
# All make .venv on first use; nothing but Python >= 3.12, git and make is
# needed. `PYTHON=/path/to/python make demo` names the interpreter.

VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR := runs/demo
# Extra flags for the demo, such as ARGS=--config.epochs=2
ARGS :=
# Extra flags for pytest, such as TESTS='tests/models -k vim'
TESTS :=

.PHONY: demo test test-long lint types suite docs format clean

demo: $(VENV)/.demo
	$(BIN)/python -m experiments.imagenet --config digits \
	  --workdir $(DEMO_DIR) $(ARGS)

test: lint types suite

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyrefly check

suite: $(VENV)/.dev
	$(BIN)/pytest -n 2 --dist worksteal $(TESTS)

test-long: $(VENV)/.dev
	$(BIN)/pytest -n 2 --dist worksteal -m long $(TESTS)

# The tables in README.md and docs/, and docs/api.md, anew.
docs: $(VENV)/.dev
	$(BIN)/python -m tests.readme_tables
	$(BIN)/python -m tests.api_reference

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache build dist *.egg-info

# The first of these that is a Python >= 3.12 able to make environments.
# (Listed one by one: a `python3` may be older, or a shim that fails.)
$(BIN)/python:
	@for p in $(PYTHON) python3.12 python3.13 python3.14 python3 python; do \
	  if "$$p" -c 'import ensurepip, sys, venv; \
	      sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then \
	    echo "making $(VENV) with $$($$p --version) ($$(command -v $$p))"; \
	    exec "$$p" -m venv $(VENV); \
	  fi; \
	done; \
	echo "No Python 3.12 or newer with venv was found (tried: $(PYTHON)" \
	  "python3.12 python3.13 python3.14 python3 python)." >&2; \
	echo "Install one (on Debian or Ubuntu: apt install python3.12" \
	  "python3.12-venv), or name it: PYTHON=/path/to/python make demo" >&2; \
	exit 1

# $(call install,EXTRAS): this checkout, editable, at the tested versions.
install = $(BIN)/python -m pip install --quiet --disable-pip-version-check \
  --constraint constraints.txt --editable '.[$(1)]'

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (once, a few minutes)"
	$(call install,train$(comma)plot)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (once, a few minutes)"
	$(call install,dev)
	@touch $@

comma := ,
