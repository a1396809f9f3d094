# Everything here needs Python >= 3.11, make and pip; each target makes .venv when it has to.
PYTHON ?= python3
PIP_VERSION = 26.3
export PIP_CONSTRAINT = constraints.txt

.PHONY: demo test check format clean

demo: .venv/installed
	.venv/bin/pcache demo

test: .venv/developed
	.venv/bin/pytest

check: .venv/developed
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

format: .venv/developed
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

.venv/bin/pip:
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT= .venv/bin/python -m pip install --quiet pip==$(PIP_VERSION)

.venv/installed: .venv/bin/pip pyproject.toml constraints.txt
	.venv/bin/pip install --quiet --editable .
	touch $@

.venv/developed: .venv/installed
	.venv/bin/pip install --quiet --group dev
	touch $@
