# Two commands do everything on a fresh clone: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DOCS   := $(VENV)/.docs-installed
OUT    ?= runs/demo
SEED   ?= 0

.PHONY: demo test test-exhaustive test-all test-fast test-lowest test-bridge lint types layers docs dist check clean

demo: $(STAMP)
	$(BIN)/crosslens demo --out $(OUT) --seed $(SEED)

# one thread each, and a process more than cores: some tests wait for processes of their own
WORKERS ?= $(shell $(PYTHON) -c "import os; print(1 + len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 'auto')")
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not exhaustive"

# what is worth running before a release: many shapes, seeds and processes, browsers, notebooks
test-exhaustive: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m exhaustive

test-all: test test-exhaustive

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not exhaustive"

# the fast tests at the lowest versions that pyproject.toml allows, on the lowest Python; needs uv
test-lowest:
	uv venv --quiet --clear --python 3.10 build/lowest
	uv pip install --quiet --python build/lowest --resolution lowest-direct -e ".[dev]"
	OMP_NUM_THREADS=1 build/lowest/bin/python -m pytest -n auto --dist worksteal -m "not slow and not exhaustive"

# what this package uses of TransformerLens, with release 4, in an environment without SAELens, which needs a release below
BRIDGE := build/transformer-lens-4
test-bridge:
	$(PYTHON) -m venv --clear $(BRIDGE)
	grep -v '^transformer-lens' constraints.txt > $(BRIDGE)/constraints.txt
	$(BRIDGE)/bin/pip install --quiet --disable-pip-version-check -c $(BRIDGE)/constraints.txt torch
	$(BRIDGE)/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	$(BRIDGE)/bin/python -c "from importlib.metadata import requires; \
	    print(*(r for r in requires('crosslens') if 'extra' not in r and 'lens' not in r), sep='\n')" > $(BRIDGE)/needed.txt
	$(BRIDGE)/bin/pip install --quiet --disable-pip-version-check -c $(BRIDGE)/constraints.txt -r $(BRIDGE)/needed.txt \
	    "transformer-lens>=4,<5" pytest
	OMP_NUM_THREADS=1 $(BRIDGE)/bin/python -m pytest --noconftest -p tests.checking tests/snapshots/test_bridge.py

# wheel and sdist, in dist
dist: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check build
	$(BIN)/python -m build

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright

layers: $(STAMP)
	$(BIN)/lint-imports

# the site, with a reference from the docstrings, in build/site; a broken link or name is an error
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: test-all lint types layers docs

# torch first and alone: an open range would take the newest build with gigabytes of GPU libraries
$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

$(DOCS): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,docs]"
	touch $(DOCS)

clean:
	rm -rf $(VENV) build dist *.egg-info
