# Two commands need nothing but Python 3.11 or newer and make; each prepares .venv when its requirements changed:
#     make demo    a small comparison of strategies on 8 fake CPU devices, with a report in runs/demo
#     make test    what CI runs: format, lint, types, a test of every law
#     make docs    the documentation as a site in site/; a link that leads nowhere is an error
#     make check   for every edit: format, lint, types, the unit tests that are quick; 4 minutes on 2 cores
#     make exhaustive   before a release: what make test does, and its laws for more strategies, policies and shapes
# Paths are relative, so that a checkout in a folder with spaces works too.

PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check exhaustive lint docs clean
.DELETE_ON_ERROR:

demo: .venv/.stamp-run
	$(PY) -m experiments.compare --config=configs/digits.py --workdir=runs/demo \
		--strategies=from_scratch,incremental,er --devices=8 --overwrite

test: lint
	$(PY) -m pytest -n auto --maxprocesses=4 --dist=worksteal -m "not exhaustive"

check: lint
	$(PY) -m pytest -n auto --maxprocesses=4 --dist=worksteal -m "not slow and not exhaustive" tests/unit

exhaustive: lint
	$(PY) -m pytest -n auto --maxprocesses=4 --dist=worksteal

lint: .venv/.stamp-dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

docs: .venv/.stamp-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

clean:
	rm -rf site .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is touched last, so that an interrupted install is taken up again by the next make.
.venv/.stamp-run: requirements.txt .venv/.stamp-venv
	@echo "installing requirements.txt into .venv (once, a few minutes)"
	@$(PIP) -r requirements.txt
	@touch $@

.venv/.stamp-docs: requirements-docs.txt .venv/.stamp-venv
	@echo "installing requirements-docs.txt into .venv (once)"
	@$(PIP) -r requirements-docs.txt
	@touch $@

.venv/.stamp-dev: requirements-dev.txt requirements-docs.txt requirements.txt .venv/.stamp-venv
	@echo "installing requirements-dev.txt into .venv (once, a few minutes)"
	@$(PIP) -r requirements-dev.txt
	@touch $@ .venv/.stamp-run

# A working .venv made by other means is kept.
.venv/.stamp-venv:
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
		command -v "$(PYTHON)" >/dev/null || \
			{ echo "error: no '$(PYTHON)' here; name a Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }; \
		"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
			{ echo "error: jaxcl needs Python 3.11 or newer and '$(PYTHON)' is older; name another: make PYTHON=python3.12" >&2; exit 1; }; \
		"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
			{ echo "error: '$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
		echo "making .venv"; \
		"$(PYTHON)" -m venv --clear .venv; \
	fi
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: jaxcl needs Python 3.11 or newer and .venv holds an older one; remove it: make clean" >&2; exit 1; }
	@touch $@
