# The two commands of the lab. `make help` lists the rest.
#   make demo      makes .venv, installs the lab and runs it: a model that learns, in about three minutes
#   make test      makes .venv, installs the tools too, and runs every notebook and every test
# Another Python: make demo PYTHON=python3.12 (run `make clean` first when .venv exists already)
# More options:   make demo ARGS="--seed 7"

PYTHON ?=
ARGS   ?=
VENV   := .venv
BIN    := $(VENV)/bin
# Without --no-compile pip compiles ten thousand files that nobody imports.
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
INPUTS := settings.ini setup.py pyproject.toml constraints.txt

# The lab never needs the hub, a display or a download.
export HF_HUB_OFFLINE = 1
export MPLBACKEND = agg

.PHONY: help demo test run-tests lowest-test lint browser-test dev export readme course docs clean
.NOTPARALLEL:

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile
	@echo "make browser-test  drives the panels in JupyterLab in a real Chromium, if there is one"
	@echo "make lowest-test   the same notebooks and tests with the lowest versions that settings.ini admits"
	@echo "make dev       makes .venv with the tools and runs nothing"
	@echo "make export    writes clip475/ from nbs/ and cleans the notebooks"
	@echo "make readme    writes README.md from nbs/index.ipynb"
	@echo "make course    writes the students' notebooks, nbs/course, from those with solutions"
	@echo "make docs      builds the documentation site from notebooks and docstrings into build/docs/"
	@echo "make lint      looks at the code with ruff and mypy and at the workflows with zizmor, as make test does first"
	@echo "make clean     removes .venv and what was built; runs/ stays"

demo: $(VENV)/.installed
	$(BIN)/clip475 demo $(ARGS)

# Lint and the site take one core each; notebooks and tests write into one temporary folder, which goes away.
test: dev
	@$(MAKE) --no-print-directory docs & site=$$!; $(MAKE) --no-print-directory lint && wait $$site
	@$(MAKE) --no-print-directory run-tests

run-tests:
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && export TMPDIR="$$tmp" && set -x \
	&& export OMP_NUM_THREADS=1 && $(BIN)/nbdev_test --n_workers 2 --path nbs \
	&& $(BIN)/python -m pytest --ignore=tests/browser --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# An environment of its own, on the oldest Python too if PYTHON names it.
lowest-test: | $(BIN)/python
	@$(PIP) uv
	@$(BIN)/uv venv --quiet --clear --python "$(or $(PYTHON),$(BIN)/python)" build/lowest
	@$(BIN)/uv pip install --quiet --python build/lowest/bin/python --resolution lowest-direct -e ".[dev]"
	@$(MAKE) --no-print-directory run-tests VENV=build/lowest

lint: dev
	$(BIN)/ruff check --quiet nbs clip475 tests bench tools docs
	$(BIN)/ruff format --quiet --check nbs tests bench tools docs
	$(BIN)/mypy --no-error-summary
	$(BIN)/zizmor --quiet --offline .github

browser-test: dev
	$(BIN)/python -m pytest -rs tests/browser $(ARGS)

dev: $(VENV)/.installed-dev

export: dev
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: dev
	$(BIN)/python tools/readme.py

course: dev
	$(BIN)/python tools/course.py

docs: dev
	rm -rf docs/api
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --jobs 2 -c docs -d build/doctrees . build/docs

clean:
	rm -rf $(VENV) build dist docs/api *.egg-info .pytest_cache .hypothesis

$(BIN)/python:
	@python=$$(sh tools/find_python.sh "$(PYTHON)") && echo "making $(VENV) with $$python" && "$$python" -m venv $(VENV)

$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	@echo "installing the lab into $(VENV); torch is large, so the first time takes a few minutes"
	@$(PIP) -e ".[photos]"
	@$(BIN)/python tools/check_install.py
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	@echo "installing the lab and its tools into $(VENV); torch is large, so the first time takes a few minutes"
	@$(PIP) -e ".[dev]"
	@$(BIN)/python tools/check_install.py
	@touch $(VENV)/.installed $@
