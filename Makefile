# Each target builds its own .venv first, once; it is redone when pyproject.toml or constraints.txt change.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
READY := .venv/.ready

export OMP_NUM_THREADS ?= 1 # our models are small: threads cost more than they bring

.PHONY: help demo test test-slow fuzz lint fmt docs bench bench-wire clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "kvferry needs Python 3.11 or newer. Run: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fast,test,dev,docs,report,data,onnx,tensorboard]'
	@touch $@

demo: $(READY) ## one model reads, another one answers: two processes, real socket, real numbers
	$(BIN)/kvferry demo

test: $(READY) ## all quick tests
	$(BIN)/pytest -q -n $(JOBS) --dist worksteal

test-slow: $(READY) ## the tests that take minutes
	$(BIN)/pytest -q -n $(JOBS) --dist worksteal -m slow --timeout 1800

fuzz: $(READY) ## a million mutated frames, then more of them guided by coverage where atheris installs
	-$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	PYTHONPATH=tests $(BIN)/python -m fuzz --engine seeded --jobs $(JOBS)
	PYTHONPATH=tests $(BIN)/python -m fuzz --engine auto --seed 1 --n 250000 --jobs $(JOBS)

lint: $(READY) ## style, formatting, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

fmt: $(READY) ## repair style and formatting
	$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format

docs: $(READY) ## build the documentation into site/; a warning is an error
	$(BIN)/zensical build --strict --clean

bench: $(READY) ## the demo for every shipped aligner: bench/PAIR.json and a report each
	@mkdir -p bench
	@for pair in $$($(BIN)/kvferry aligners --names); do \
	  $(BIN)/kvferry demo --sender $${pair%-to-*} --receiver $${pair#*-to-} \
	    --json bench/$$pair.json --report bench/$$pair || exit 1; \
	done

bench-wire: $(READY) ## codecs of ours and of others side by side: bench/wire.json and bench/wire.svg
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@mkdir -p bench
	$(BIN)/kvferry bench wire --json bench/wire.json --plot bench/wire.svg --page bench/wire.md

clean: ## remove what was built, the .venv too
	rm -rf .venv site bench dist .pytest_cache .ruff_cache .hypothesis
