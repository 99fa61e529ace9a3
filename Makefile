PYTHON := $(shell command -v python3.11 || command -v python3.12 || echo python3)
BIN := .venv/bin
# two threads on two busy cores were measured 20 times slower: every test worker gets one
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 POLARS_MAX_THREADS=1
export MALLOC_BENCH_DATA ?= $(abspath $(wildcard ../shared/data))

.PHONY: setup run test test-slow lint bench clean
setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

run: setup
	$(BIN)/malloc-bench run suites/quick.yaml

test: setup
	$(ONE_THREAD) $(BIN)/pytest -n 2 -m "not slow"

test-slow: setup
	$(ONE_THREAD) $(BIN)/pytest -n 2 -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/pytest benchmarks --benchmark-only -p no:xdist -s --timeout 0

clean:
	rm -rf .venv build dist runs .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
