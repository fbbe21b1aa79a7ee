# make demo: RoPE against FoPE on real text, on any machine. make test: everything the tests can check here.
# JOBS=4 tests in so many processes (each starts launches of up to 4 ranks).
# PYTHON=/path/to/python3.12 picks the interpreter, TORCH_INDEX_URL=https://... another source of torch.
# Versions are those of .ci/constraints.txt, which were tested together; make test-newest ignores them.

VENV ?= .venv
BIN := $(VENV)/bin
BENCH_OUT ?= out/bench
JOBS ?= 2
KERNEL_TESTS := tests/kernels/test_triton_rotary.py tests/kernels/test_launch.py tests/kernels/test_backend.py
# A file stays in one process, with its fixtures; in the order of tests/conftest.py.
BY_FILE := --dist loadfile --no-loadscope-reorder
export PYTHON TORCH_INDEX_URL VENV NEWEST

.PHONY: help setup demo extend real-model docs test test-fast test-newest test-vllm test-bridge test-lm-eval \
	coverage constraints layouts reshard bench bench-gpu test-gpu upstream-tests lint clean

help:
	@echo "make demo   train a RoPE and a FoPE twin, evaluate both up to 16x the training length"
	@echo "            DEMO_ITERS=1000 DEMO_OUT=out/demo"
	@echo "make extend  ways to a four times longer context, compared (an hour on 2 cores)"
	@echo "make real-model  SmolLM2-135M continued with RoPE, YaRN and FoPE, and exported (some hours on 2 cores)"
	@echo "            REAL_MODEL_SMALL=1 whether it runs; REAL_MODEL_OUT=out/real_model"
	@echo "make test   the whole test suite"
	@echo "make test-fast  its part that starts no training (a few minutes)"
	@echo "make test-newest  the same with the newest release of everything, in .venv-newest"
	@echo "make test-vllm  exported models in vLLM on the CPU, in .venv-vllm, which it makes first"
	@echo "make test-bridge  Megatron-Bridge (Python 3.12), the same way"
	@echo "make test-lm-eval  a local task in lm_eval, the same way"
	@echo "make coverage  the whole test suite, and what part of the package it runs, subprocesses included"
	@echo "make constraints VENV=.venv-newest  after it: keep these versions for all other commands"
	@echo "make layouts  real training in 87 parallel layouts, each against one rank (half an hour)"
	@echo "make reshard  every layout's checkpoint loaded by every other (half an hour)"
	@echo "make bench  speed, memory and step time beside RoPE; BENCH_OUT=out/bench"
	@echo "make bench-gpu  the kernels' tests, then the same on a GPU"
	@echo "make test-gpu  Transformer Engine, FP8 and CUDA graphs on one GPU (docs/gpu.md)"
	@echo "make upstream-tests MEGATRON_LM=/path/to/Megatron-LM"
	@echo "            its own unit tests with FoPE in RoPE's place (half an hour)"
	@echo "make lint   style (ruff), spelling (codespell), types (mypy)"
	@echo "make docs   the documentation as a site, in out/docs"
	@echo "make setup  only the environment, in $(VENV)"

setup:
	@bash .ci/setup-env

demo: setup
	@$(BIN)/python examples/demo/run.py

extend: setup
	@$(BIN)/python examples/extend/run.py starts
	@$(BIN)/python examples/extend/run.py growth

real-model: setup
	@$(BIN)/python examples/real_model/run.py

test: setup
	@$(BIN)/python -m pytest -n $(JOBS) $(BY_FILE) --durations=40

test-fast: setup
	@$(BIN)/python -m pytest -q -n $(JOBS) $(BY_FILE) -m "not launch"

test-newest:
	@$(MAKE) test VENV=.venv-newest NEWEST=1

test-vllm: setup
	@bash .ci/setup-extra vllm
	@$(BIN)/python -m pytest -s tests/serving/test_vllm.py

test-bridge: setup
	@bash .ci/setup-extra bridge
	@$(BIN)/python -m pytest -s tests/serving/test_bridge.py

test-lm-eval: setup
	@bash .ci/setup-extra lm-eval
	@$(BIN)/python -m pytest -s tests/serving/test_lm_eval.py

coverage: setup
	@$(BIN)/python -m coverage erase
	@$(BIN)/python -m coverage run -m pytest -n $(JOBS) $(BY_FILE)
	@$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage report

constraints:
	@$(BIN)/python .ci/constraints.py

layouts: setup
	@$(BIN)/python tests/layouts.py

reshard: setup
	@$(BIN)/python tests/reshard.py

bench: setup
	@$(BIN)/python examples/bench all --out $(BENCH_OUT)
	@$(BIN)/python examples/bench communication --out $(BENCH_OUT)

bench-gpu: setup
	@$(BIN)/python -m pytest -q $(KERNEL_TESTS)
	@$(BIN)/python examples/bench all --device cuda --out $(BENCH_OUT)

test-gpu: setup
	@$(BIN)/python -m pytest -q -rs tests/gpu $(KERNEL_TESTS)

upstream-tests: setup
	@test -n "$(MEGATRON_LM)" || { echo "upstream-tests: error: MEGATRON_LM is not set; give a Megatron-LM checkout" >&2; exit 2; }
	@$(BIN)/python tests/upstream/run.py --megatron-lm $(MEGATRON_LM) --ranks 4 --report tests/upstream.md

docs: setup
	@$(BIN)/python -m sphinx -W --keep-going -q -b html -c docs . out/docs

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/codespell
	@$(BIN)/mypy

clean:
	@test ! -e $(VENV)/.made-by-setup || rm -rf $(VENV)
	rm -rf out build dist *.egg-info
