PYTHON := $(shell command -v python3.11 || command -v python3.12 || echo python3)
BIN := .venv/bin
TOOLS := .venv-tools/bin
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# two threads on two busy cores were measured 20 times slower: every test worker gets one
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 POLARS_MAX_THREADS=1
export MALLOC_BENCH_DATA ?= $(abspath $(wildcard ../shared/data))

.PHONY: setup services run test test-slow campaign lint bench lock audit dist clean
setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[test,fast]'
	touch $@

# what the tests of stores and of the page start: a Redis server and a browser; without them those tests are skipped
services:
	$(SUDO) apt-get update -qq
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends redis-server chromium

run: setup
	$(BIN)/malloc-bench run suites/quick.yaml

test: setup
	$(ONE_THREAD) $(BIN)/pytest -n 2 -m "not slow"

test-slow: setup
	$(ONE_THREAD) $(BIN)/pytest -n 2 -m slow

# an hour at most on all cores; MINUTES=10 cuts it short
campaign: setup
	$(BIN)/pip install -q -c constraints.txt -e '.[ray]'
	$(ONE_THREAD) $(BIN)/python tests/faults/campaign.py --minutes $(or $(MINUTES),60) --write docs/reliability.md

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/pytest benchmarks --benchmark-only -p no:xdist -s --timeout 0

# what locks, audits and packs; none of it is needed to run or to test
.venv-tools/installed:
	$(PYTHON) -m venv .venv-tools
	$(TOOLS)/pip install -q uv pip-audit cyclonedx-bom build
	touch $@

lock: .venv-tools/installed
	$(TOOLS)/python .ci/lock.py $(TOOLS)/uv

audit: .venv-tools/installed
	@for part in all cuda; do $(TOOLS)/pip-audit --strict --require-hashes --disable-pip -r lock/$$part.txt || \
		{ echo "lock/$$part.txt: not audited, or not clean, as said above"; exit 1; }; done

# the wheel, the same bit for bit wherever it is built of a commit, and what it stands on
dist: .venv-tools/installed
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(TOOLS)/python -m build -w .
	$(TOOLS)/cyclonedx-py requirements --output-reproducible --pyproject pyproject.toml -o dist/sbom.json lock/all.txt
	cd dist && sha256sum *.whl sbom.json

clean:
	rm -rf .venv .venv-tools build dist runs .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
