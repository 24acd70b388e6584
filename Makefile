# make help lists the targets. PYTHON=python3 uses an environment that exists, as it is,
# instead of creating .venv: nothing is installed into it, so it is told where the clone is.

# What may be said on make's command line is assigned here with :=, which what another program's
# PYTHON, URL or WORKERS says in the environment does not survive.
PYTHON := .venv/bin/python
ifeq ($(origin PYTHON),command line)
READY :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
READY := .venv/.installed
endif

NB := notebooks/*.ipynb book/hardware.ipynb
NOTEBOOKS := notebooks book/hardware.ipynb
# Strict: every cell without the tag nbval-ignore-output is compared.
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout=900
# One notebook stays on one worker, in order. loadscope hands out whole notebooks and single
# tests with all their parameters (conftest.py).
WORKERS := 2

.DEFAULT_GOAL := help
.PHONY: help book test portable gpu fuzz sanitize lab execute wheelhouse clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# URL=https://... is the repository's address, where it is not that of the clone's remote.
URL :=
book: $(READY) ## render the book into _build/html; no warning survives
	@BOOK_URL=$(URL) $(PYTHON) -c 'from jupyter_book.cli.main import main; main()' \
		build . --all -W -n --keep-going -q
	@echo "The book is built. Open _build/html/index.html"

test: $(READY) ## lint, build the book, run every test and every notebook
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	@$(MAKE) --no-print-directory book
	$(PYTHON) -m pytest tests $(NOTEBOOKS) $(NBVAL) -n $(WORKERS) --dist loadscope

portable: $(READY) ## every notebook again, in the arithmetic of four other machines
	$(PYTHON) tools/portable.py $(PYTHON) -m pytest $(NOTEBOOKS) $(NBVAL) -q \
		-n $(WORKERS) --dist loadscope

# PART=tests or PART=notebooks runs one of the two, GPU_WORKERS=15 fifteen processes.
PART := tests notebooks
GPU_WORKERS :=
gpu: $(READY) ## the same tests on a GPU; fails where no GPU is seen
	$(if $(filter-out tests notebooks,$(PART)),$(error PART is tests or notebooks))
	RCM_REQUIRE_GPU=1 $(PYTHON) -m pytest $(PART:notebooks=$(NOTEBOOKS)) $(NBVAL) \
		--ignore=tests/test_html.py $(if $(GPU_WORKERS),-n $(GPU_WORKERS) --dist loadscope)

FUZZ_CALLS := 10000
FUZZ_SEED := 0
fuzz: $(READY) ## random calls of every function on a GPU, each against float64
	RCM_REQUIRE_GPU=1 $(PYTHON) -m tools.fuzz --calls $(FUZZ_CALLS) --seed $(FUZZ_SEED) \
		--workers $(or $(GPU_WORKERS),8)

# compute-sanitizer comes with the CUDA toolkit. Both use 8 processes, or GPU_WORKERS.
TOOLS := memcheck racecheck initcheck
sanitize: $(READY) ## compute-sanitizer watches a call of every kernel variant
	$(PYTHON) -m tools.sanitize --tools $(TOOLS) --workers $(or $(GPU_WORKERS),8)

lab: $(READY) ## open JupyterLab on the notebooks
	$(PYTHON) -m jupyterlab --notebook-dir=notebooks

execute: $(READY) ## re-run notebooks in place (NB=notebooks/04_*.ipynb for one)
	$(PYTHON) tools/execute.py $(NB)

# pip matches a platform tag exactly, so every tag in use is named.
TAGS := 2_34 2_31 2_28 2_27 2_26 2_24 2_17 2_12 2_5
wheelhouse: $(READY) ## collect the wheels a GPU host without internet needs
	$(PYTHON) -m pip download -q --dest wheelhouse --requirement requirements-wheelhouse.txt \
		--no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		$(TAGS:%=--platform manylinux_%_x86_64) --platform manylinux2014_x86_64 \
		--platform manylinux2010_x86_64 --platform manylinux1_x86_64
	@echo "Copy wheelhouse/ to the GPU host; book/how-to-run.md says what to do there."

clean: ## remove what was built (keeps .venv)
	rm -rf _build wheelhouse .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -rf build *.egg-info

# The stamp is younger than both files once everything is installed.
OK := 'import sys; sys.exit(sys.version_info < (3, 11))'
.venv/.installed: requirements.txt pyproject.toml
	@if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then \
		for python in python3 python3.13 python3.12 python3.11; do \
			$$python -c $(OK) 2>/dev/null && break; python=; \
		done; \
		[ -n "$$python" ] || { \
			echo "error: Python 3.11 or newer is needed, and none was found." >&2; \
			echo "       Install one, or name one: make PYTHON=/path/to/python ..." >&2; \
			exit 1; }; \
		echo "Creating .venv with $$($$python --version) ..."; \
		$$python -m venv --clear .venv || { \
			echo "error: could not create .venv (Debian, Ubuntu: apt install python3-venv)" >&2; \
			exit 1; }; \
	fi
	@echo "Installing requirements.txt into .venv (minutes, the first time) ..."
	@.venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@
