# Two verbs for a visitor: `make bench` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help bench test test-gpu lint type plot docs clean
.DEFAULT_GOAL := help

help:  ## list these verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

# one stamp per set of extras: a second run does not reinstall unless the metadata changed
$(VENV)/stamp-%: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

bench: $(VENV)/stamp-bench  ## compare fastlstm with torch.nn.LSTM on this machine
	$(BIN)/python -m benchmarks $(ARGS)

test: $(VENV)/stamp-test  ## prove outputs and every gradient, on the CPU
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-gpu: $(VENV)/stamp-test  ## the same proofs, natively on the GPU
	$(BIN)/python -m pytest -m gpu -n 4 --dist worksteal $(ARGS)

lint: $(VENV)/stamp-dev  ## ruff check and ruff format --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/stamp-dev  ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

plot: $(VENV)/stamp-bench  ## draw the committed result files again, and the table of the README
	$(BIN)/python -m benchmarks.plot

docs: $(VENV)/stamp-docs  ## build the pages under docs/ into docs/_build
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build

clean:  ## remove the virtual environment and every cache
	rm -rf $(VENV) build dist docs/_build examples/output *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
