# make demo   new images from the built-in data, in out/
# make test   the test suite
# make lint   ruff and mypy
# make docs   what is generated in docs/ and README.md, from the code and from the results of benchmarks
# make bench  the CPU benchmarks in short, in out-bench/
# make sanitize   the C++ engines under sanitizers
# make gpu-check  the tests that need a GPU, then under compute-sanitizer
# PYTHON=python3.12 picks another interpreter; CONSTRAINTS= drops the pins.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= -c constraints.txt
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt $(wildcard setup.py csrc/* csrc/*/*)

.PHONY: demo test lint docs bench sanitize gpu-check clean

# Without a compiler the engine in plain torch serves; fewer training images keep that within minutes too.
demo: $(VENV)/.installed
	@limit=4000; $(BIN)/python -c 'import patchscore._native' 2>/dev/null || limit=1000; \
	    set -x; $(BIN)/patchscore sample fashion-mnist --labels all --limit $$limit --overwrite --out out

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-test
	$(BIN)/python tools/reference.py
	$(BIN)/python benchmarks/report.py

bench: $(VENV)/.installed-test
	$(BIN)/patchscore bench

# The C++ engines under AddressSanitizer and UBSan, on every instruction set of this machine; some minutes.
sanitize:
	tests/sanitize/run.sh

# What only a GPU can show: numbers, streams, devices; then no access out of bounds and no race in shared memory.
gpu-check: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m gpu
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest -m gpu tests/test_sliding_cuda.py
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m pytest -m gpu tests/test_sliding_cuda.py

clean:
	rm -rf $(VENV) build out *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python $(INPUTS)
	$(BIN)/pip install -q $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install -q $(CONSTRAINTS) -e '.[test]'
	touch $@
