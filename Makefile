# Every target installs what it needs: a virtual environment in .venv, then the packages that pyproject.toml names.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml setup.py $(wildcard normfree/native/*.[ch])
# Two test processes, since tests use one thread each.
PYTEST := $(BIN)/python -m pytest -n 2

.PHONY: help demo lint test test-all slow browser interop reliability docs bench reproduce privacy format clean

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' Makefile | sed 's/:.*##/\t/'

.venv/bin/python:
	@echo "== creating a virtual environment in .venv"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "Python 3.11 or newer is required. Fix: make PYTHON=python3.12 ..."; exit 1)
	$(PYTHON) -m venv .venv

.venv/.%: $(SOURCES) | .venv/bin/python
	@echo "== installing normfree[$*] (torch and torchvision: minutes the first time)"
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

demo: .venv/.demo  ## train a small network on the embedded emoji; results in runs/demo-N/
	@echo "== normfree train"
	$(BIN)/normfree train

lint: .venv/.dev   ## check formatting, lint and types
	@echo "== ruff and mypy"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint         ## lint, types and the default tests
	@echo "== pytest"
	$(PYTEST)

test-all: lint     ## lint, types and all tests that need no GPU and no browser, also those that take minutes
	$(PYTEST) -m "not gpu and not browser and not interop"

slow: .venv/.dev   ## only the tests that take minutes
	$(PYTEST) -m "slow and not interop"

browser: .venv/.dev ## test the page of normfree serve in a real browser
	@command -v chromium >/dev/null || (echo "chromium is missing. Fix: apt-get install chromium"; exit 1)
	$(BIN)/python -m pytest -m browser

interop: .venv/.interop ## test with timm, Lightning, Transformers, Opacus, OpenVINO and others; writes docs/hosts.md
	$(BIN)/python -m pytest -m "(interop or works or refuses) and not slow" --hosts-table docs/hosts.md tests

reliability: .venv/.fuzz ## try every promise of docs/reliability.md in full (hours; continues where it was interrupted) and write that page
	nice $(BIN)/python -m reliability

docs: .venv/.docs  ## build the documentation site in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: .venv/.bench ## CPU speed against timm and others, under 20 minutes; writes benchmarks/results/ and docs/results.md
	$(BIN)/python -m benchmarks.run --device cpu

DATA ?= cifar10
OPTIONS ?=
reproduce: .venv/.demo ## the papers' experiments, five to six hours on two cores: make reproduce DATA=FOLDER OPTIONS="--only depth"
	$(BIN)/python -m experiments.run --data $(DATA) $(OPTIONS)

privacy: .venv/.demo .venv/.private ## accuracy under differential privacy, about two hours on two cores: make privacy DATA=FOLDER
	$(BIN)/python -m experiments.run --data $(DATA) --only privacy $(OPTIONS)

format: .venv/.dev ## reformat the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:           ## remove the environment and build products, but no runs
	rm -rf .venv build site normfree/native/_compiled.* *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
