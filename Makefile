# Each target builds its own .venv first, once; it is redone when pyproject.toml or constraints.txt change.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
READY := .venv/.ready

export OMP_NUM_THREADS ?= 1 # our models are small: threads cost more than they bring

.PHONY: help demo test test-slow fuzz lint fmt docs bench bench-wire bench-curves clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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

CURVE = $(BIN)/kvferry curve --seeds 3 --resume --cache bench/curves
SPECS = docs/recipes/curves
MODELS = $${KVFERRY_SHARED:-../shared}/models

bench-curves: $(READY) ## what bytes buy, every table of docs/curves.md: hours, and again from where it was ended
	@mkdir -p bench
	$(BIN)/kvferry fit-importance --sender llama --receiver llama --codec 'ecsq(profile=llama)' --out bench/importance-llama
	$(CURVE) --pair llama-to-llama --task place:8 --specs-file $(SPECS)/place8.txt --items 80 --dev-items 64 \
	  --caps 200,300,400,550,750,1000,1400,2000,4000,5600,8000 --csv bench/curve-llama-place8.csv
	$(CURVE) --pair llama-to-llama --task place:16 --specs-file $(SPECS)/place16.txt --items 80 --dev-items 64 \
	  --caps 250,400,550,750,1000,1400,2000,4000,7000,10000,14000 --csv bench/curve-llama-place16.csv
	$(CURVE) --pair llama-to-llama --task place:32 --specs-file $(SPECS)/place32.txt --items 60 --dev-items 32 \
	  --caps 500,750,1000,1400,2000,3000,5000,9000,16000 --csv bench/curve-llama-place32.csv
	$(CURVE) --pair llama-to-llama --task needle --specs-file $(SPECS)/needle.txt --items 90 --dev-items 64 \
	  --caps 250,400,600,900,1400,2200,3500,5500,9000,14000,22000 --csv bench/curve-llama-needle.csv
	$(BIN)/kvferry fit --recipe docs/recipes/small-messages.yaml --out bench/llama-to-gemma3-small
	$(BIN)/kvferry fit-importance --aligner bench/llama-to-gemma3-small --codec 'ecsq(profile=llama)' --data places --steps 300 \
	  --out bench/importance-gemma3
	$(CURVE) --pair llama-to-gemma3 --aligner bench/llama-to-gemma3-small --task place:8 --items 60 --dev-items 64 \
	  --specs-file $(SPECS)/place8-gemma3.txt --caps 200,300,400,550,750,1000,1400,2000,4000,5600,8000 \
	  --csv bench/curve-llama-gemma3-place8.csv
	$(BIN)/kvferry fit-importance --sender $(MODELS)/stories260K --receiver $(MODELS)/stories260K --codec ecsq --data stories \
	  --batch-size 8 --steps 300 --out bench/importance-stories260K
	$(CURVE) --pair stories260K-to-stories260K --task continuation --specs-file $(SPECS)/stories.txt --items 60 --dev-items 32 \
	  --caps 500,900,1400,2000,2800,4000,6000,9000,14000,20000,28000 --csv bench/curve-stories260K.csv
	$(BIN)/kvferry fit --recipe docs/recipes/small-messages-stories.yaml --sender $(MODELS)/llama2xs --receiver $(MODELS)/stories260K \
	  --out bench/llama2xs-to-stories260K
	$(BIN)/kvferry fit-importance --sender $(MODELS)/llama2xs --receiver $(MODELS)/stories260K --data stories --batch-size 8 \
	  --aligner bench/llama2xs-to-stories260K --codec ecsq --steps 300 --out bench/importance-llama2xs
	$(CURVE) --pair llama2xs-to-stories260K --aligner bench/llama2xs-to-stories260K --task continuation --items 60 --dev-items 32 \
	  --specs-file $(SPECS)/llama2xs-stories260K.txt --caps 500,900,1400,2000,2800,4000,6000,9000,14000,20000,28000 \
	  --csv bench/curve-llama2xs-stories260K.csv

clean: ## remove what was built, the .venv too
	rm -rf .venv site bench dist .pytest_cache .ruff_cache .hypothesis
