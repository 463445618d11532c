# Everything sets itself up: a virtual environment in .venv, then the packages that pyproject.toml names.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint slow browser bench format clean

help:            ## what can be made
	@grep -E '^[a-z]+: .*##' Makefile | sed 's/:.*##/\t/'

.venv/bin/python:
	@echo "== making a virtual environment in .venv"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1)
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml setup.py $(wildcard normfree/native/*.[ch]) | .venv/bin/python
	@echo "== installing normfree with what the demo needs (torch and torchvision: minutes the first time)"
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	@touch $@

.venv/.dev: pyproject.toml setup.py $(wildcard normfree/native/*.[ch]) | .venv/bin/python
	@echo "== installing normfree with what the tests need (torch and torchvision: minutes the first time)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

.venv/.bench: pyproject.toml setup.py $(wildcard normfree/native/*.[ch]) | .venv/bin/python
	@echo "== installing normfree with what the benchmarks need (torch and torchvision: minutes the first time)"
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	@touch $@

demo: .venv/.demo  ## train a small network on the embedded emoji; ends in runs/demo-N/
	@echo "== normfree train"
	$(BIN)/normfree train

lint: .venv/.dev   ## formatter, linter, type checker
	@echo "== ruff and mypy"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint         ## the default tests, after lint
	@echo "== pytest"
	$(BIN)/python -m pytest

slow: .venv/.dev   ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

browser: .venv/.dev ## the page of normfree serve in a real browser
	@command -v chromium >/dev/null || (echo "chromium is missing: apt-get install chromium"; exit 1)
	$(BIN)/python -m pytest -m browser

bench: .venv/.bench ## speed against timm and others on the CPU, under 20 minutes; results/ and the README's table
	$(BIN)/python benchmarks/run.py --device cpu

format: .venv/.dev ## rewrite the code as the formatter wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:           ## remove what was made, but no runs
	rm -rf .venv build normfree/native/_compiled.* *.egg-info .pytest_cache .ruff_cache .mypy_cache
