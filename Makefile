# make demo: RoPE against FoPE on real text, on any machine. make test: everything the tests can check here.
# PYTHON=/path/to/python3.12 picks the interpreter, TORCH_INDEX_URL=https://... another source of torch.

VENV ?= .venv
BIN := $(VENV)/bin
export PYTHON TORCH_INDEX_URL VENV

.PHONY: help setup demo test layouts lint clean

help:
	@echo "make demo   train a RoPE and a FoPE twin, evaluate both up to 16x the training length"
	@echo "            DEMO_ITERS=1000 DEMO_OUT=out/demo"
	@echo "make test   the whole test suite"
	@echo "make layouts  real training in 39 parallel layouts, each against one rank (15 minutes)"
	@echo "make lint   ruff"
	@echo "make setup  only the environment, in $(VENV)"

setup:
	@bash .ci/setup-env

demo: setup
	@$(BIN)/python examples/demo/run.py

test: setup
	@$(BIN)/python -m pytest

layouts: setup
	@$(BIN)/python tests/layouts.py

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) out build dist *.egg-info
