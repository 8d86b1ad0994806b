# make run: set up, watch the demo, then serve.  make test: set up, lint, type-check, test.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install run test lint train-phantom turnaround clean

install: .venv/.installed

# The constraints pin what was tested together. pip takes torch's build for this machine.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

run: install
	$(BIN)/cspine demo
	$(BIN)/cspine serve

test: lint
	$(BIN)/pytest

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Trains the bundled weights again, on the procedural phantom only.
train-phantom: install
	$(BIN)/cspine-train phantom --out model/weights/phantom

# From the last acknowledged Instance to the stored SEG and SR, by stage.
turnaround: install
	$(BIN)/python benchmarks/turnaround.py

clean:
	rm -rf .venv build *.egg-info
