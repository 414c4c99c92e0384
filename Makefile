# Each target sets up what it needs: a virtual environment with the pinned set, once.
#   make book      execute the chapters and build the site
#   make pdf       the same book on paper, in build/pdf (needs LaTeX)
#   make slides    slides of each chapter's figures and questions, in build/slides
#   make test      lint, tests, doctests and notebooks
#   make lint      ruff, the directions of imports, types, the workflows
#   make lab       JupyterLab on a copy of the chapters, to work in
#   make notebooks execute the chapters into book/notebooks (ONLY=03 for one)
#   make gpu       the tests that need an NVIDIA GPU, and compute-sanitizer where it is installed
#   make test-newest  the same tests with the newest of all that pyproject.toml allows
#   make test-oldest  and with the oldest torch and Triton that it allows
#   make dist      wheel and source distribution, in dist
#   make lock      requirements-hashed.txt from constraints.txt (needs uv)
#   make margins   how much room each tolerance leaves, under several settings of the BLAS
#   make aot       compile every kernel configuration for GPUs that need not be there
#   make clean     remove what was built; the environment stays (delete .venv to start afresh)
# `make test PYTHON=python3` uses an environment that exists, and installs nothing.
# `make test BASE=python3.12` builds the environment from another Python than python3.

BASE ?= python3
VENV := .venv
PINS := -c constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
ONLY ?=

ifdef PYTHON
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

# Two processes run side by side; more threads each would only get in one another's way.
export OMP_NUM_THREADS ?= 1
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

# pyright asks for a path, where PYTHON may be a name.
INTERPRETER = $$($(PY) -c 'import sys; print(sys.executable)')

# Whole files go to two processes, in the order of conftest.py: the dearest first.
SUITE = $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --doctest-modules --nbval book/notebooks tests dn_lib tools

.PHONY: help book pdf slides test lint test-newest test-oldest suite margins lab notebooks gpu aot dist lock clean
help:
	@sed -n 's/^#   //p' Makefile

# torch comes first and by itself: one requirement alone keeps pip from fetching gigabytes while it compares versions.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(BASE) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or later is needed, $(BASE) is older: try  make $(MAKECMDGOALS) BASE=python3.12"; exit 1; }
	@echo "[1/3] virtual environment in $(VENV)"
	$(BASE) -m venv $(VENV)
	@echo "[2/3] torch, the largest part"
	$(VENV)/bin/python -m pip install --disable-pip-version-check $(PINS) "$(TORCH)"
	@echo "[3/3] the rest"
	$(VENV)/bin/python -m pip install --disable-pip-version-check $(PINS) -e ".[book,test,dev]"
	@$(VENV)/bin/python -c 'import matplotlib.font_manager'  # builds its font cache, which would warn later
	@touch $@

book: $(READY)
	$(PY) -m tools.site
	@echo "Begin with chapter 1: the page above, then 'Linear attention'.  To work in the chapters:  make lab"

pdf: $(READY)
	$(PY) -m tools.pdf

slides: $(READY)
	$(PY) -m tools.slides

test: lint
	$(SUITE)

# What needs no test to be seen. pyright is told which environment to read: by itself it takes the first Python on PATH.
lint: $(READY)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()' --no-logo --no-cache
	$(PY) -m pyright --pythonpath $(INTERPRETER)
	$(PY) -m pyright --pythonpath $(INTERPRETER) --project pyright-strict.json
	$(PY) -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(PY) -m check_jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	@if command -v actionlint > /dev/null; then actionlint; \
	  else echo "actionlint is not installed: only the workflows' form was checked"; fi

# In an environment of its own, from the ranges alone: what `pip install dn-lib` gives on the day. No lint, since a
# newer ruff has rules of its own.
test-newest:
	$(MAKE) suite VENV=.venv-newest PINS= TORCH="$$(sed -n 's/^  "\(torch>[^"]*\)",$$/\1/p' pyproject.toml)"

# The other end: torch brings the Triton that it asks for.
test-oldest:
	$(MAKE) suite VENV=.venv-oldest PINS= TORCH="$$(sed -n 's/^  "torch>=\([0-9.]*\),.*",$$/torch==\1.*/p' pyproject.toml)"

suite: $(READY)
	$(SUITE)

margins: $(READY)
	$(PY) -m tools.margins

# A copy, so that working in the chapters changes nothing that git tracks.
lab: $(READY)
	@mkdir -p lab && cp -n book/notebooks/*.ipynb lab/ || true
	@echo "JupyterLab opens chapter 1 in your browser; if not, follow the address below to 01_linear_attention."
	@echo "Fill in an exercise, run its cell, and check() says what is right.  Ctrl-C here ends JupyterLab."
	@trap : INT; $(PY) -m jupyterlab --LabApp.news_url=None --notebook-dir=lab lab/01_linear_attention.ipynb; \
	  echo "Your work is in lab/, and make lab goes on with it.  After chapter 1: lab/02_delta_rule.ipynb"

notebooks: $(READY)
	$(PY) -m tools.notebooks --only=$(ONLY)

gpu: $(READY)
	@$(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
	  || { echo "make gpu needs an NVIDIA GPU that torch can see; 'make test' needs none"; exit 1; }
	$(PY) -m pytest -m gpu tests
	@command -v compute-sanitizer > /dev/null || echo "compute-sanitizer is not installed: the kernels' accesses were not checked"
	@! command -v compute-sanitizer > /dev/null || $(PY) -m experiments sanitizer --out build/sanitizer.json

aot: $(READY)
	$(PY) -m dn_lib.kernels.aot --all
	$(PY) -m dn_lib.kernels.gla.aot --all

dist: $(READY)
	rm -rf dist
	$(PY) -m hatchling build -d dist

# The pinned set once more, for every platform, with digests: pip install --require-hashes -r requirements-hashed.txt
lock:
	uv pip compile --quiet --universal --python-version 3.11.5 --generate-hashes --no-header --no-annotate \
	  -c constraints.txt --extra book --extra test --extra dev pyproject.toml -o requirements-hashed.txt

clean:
	rm -rf book/_build book/.jupyter_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
