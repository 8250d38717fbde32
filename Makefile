# make demo        new images from the built-in data, in out/
# make test        the test suite
# make lint        style and types of Python, style of C++, and the files that configure other tools
# make format      rewrites Python and C++ in the project's style
# make docs        what is generated in docs/ and README.md, from the code and from the results of benchmarks
# make site        the documentation site, in site/
# make bench       the CPU benchmarks in short, in out-bench/
# make triton-check  every test of the Triton kernels, interpreted and compiled ahead of time, without a GPU
# make sanitize    the C++ engines under sanitizers
# make emulate     the CUDA kernels under an emulator stricter than a GPU: more shapes and orders than in make test
# make fuzz   damaged files of every format to everything that reads files, for FUZZ_SECONDS=60
# make fuzz-engines  any bytes to the C++ engines, for FUZZ_SECONDS=60, where clang has libFuzzer
# make faults      commands killed, starved and given changed files: KILLS=50 times each, then all is as if nothing was
# make gpu-check   the tests that need a GPU
# make gpu-quick   on a bare machine with a GPU: build, tests, sanitizers and benchmarks in ten minutes, in out-gpu/
# make sdist       the source distribution, in dist/
# make wheel       a wheel for this machine, in dist/; wheel-test installs it into an empty environment and runs it
# PYTHON=python3.12 picks another interpreter; CONSTRAINTS= drops the pins.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= -c constraints.txt
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt $(wildcard setup.py csrc/* csrc/*/*)
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

.PHONY: demo test lint format docs site bench triton-check sanitize emulate fuzz fuzz-engines faults gpu-check gpu-quick sdist wheel wheel-test clean

# Without a compiler the engine in plain torch serves; fewer training images keep that within minutes too.
demo: $(VENV)/.installed
	@limit=4000; $(BIN)/python -c 'import patchscore._native' 2>/dev/null || limit=1000; \
	    set -x; $(BIN)/patchscore sample fashion-mnist --labels all --limit $$limit --overwrite --out out

# A process a core; the tests of a file stay together, for they share what they build.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n logical --dist loadfile

# mypy sees the types of the extras too.
lint: $(VENV)/.installed-lint $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(filter-out csrc/sliding/sliding.cu tests/emulation/%,$(CXX_FILES))
	$(BIN)/check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema -q --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)/check-jsonschema -q --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema -q --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema -q --builtin-schema vendor.citation-file-format --force-filetype yaml CITATION.cff

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(VENV)/.installed-test
	$(BIN)/python tools/reference.py
	$(BIN)/python tools/schedulers.py
	$(BIN)/python benchmarks/report.py

# Warnings are errors: a broken link, a page without a place, a parameter documented that there is not.
site: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.installed-test
	$(BIN)/patchscore bench

triton-check: $(VENV)/.installed-test
	PATCHSCORE_TRITON_CHECK=all $(BIN)/python -m pytest $$(grep -l needs_triton tests/test_*.py)

# The C++ engines under AddressSanitizer and UBSan, on every instruction set of this machine; some minutes.
sanitize:
	tests/sanitize/run.sh

emulate: $(VENV)/.installed-test
	PATCHSCORE_EMULATE=all $(BIN)/python -m pytest -m "not gpu" tests/test_emulation.py tests/test_sliding_cuda.py

# Another seed every day, which names what is kept. Where atheris is installed, the second half of the time is its own.
FUZZ_SECONDS := 60
FUZZ_SEED := $(shell date +%Y%m%d)
FUZZ := $(BIN)/python tests/fuzz/readers.py --seconds $$(( $(FUZZ_SECONDS) / 2 )) --seed
fuzz: $(VENV)/.installed-test
	$(FUZZ) $(FUZZ_SEED)
	$(FUZZ) $$(( $(FUZZ_SEED) + 1000000 )) $$($(BIN)/python -c 'import atheris' 2>/dev/null && echo --atheris)

fuzz-engines:
	tests/fuzz/engines.sh $(FUZZ_SECONDS)

KILLS := 50
faults: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/faults.py --kills $(KILLS)

# What only a GPU can show: numbers, streams, devices. A fallback is an error there.
gpu-check: $(VENV)/.installed-test
	PATCHSCORE_STRICT=1 $(BIN)/python -m pytest -m gpu

# Without a virtual environment and a network: PYTHON is one that has torch. docs/gpu.md tells more.
gpu-quick:
	PYTHON=$(PYTHON) benchmarks/gpu_quick.sh

sdist: $(VENV)/.installed-release
	$(BIN)/python -m build --sdist --outdir dist
	$(BIN)/twine check --strict dist/*.tar.gz

# On Linux auditwheel gives it the lowest manylinux tag that its symbols allow. Without the CUDA kernels, as published
# wheels are: PATCHSCORE_CUDA=1 builds them in where nvcc is.
wheel: $(VENV)/.installed-release
	rm -rf build/wheel dist/*.whl
	PATCHSCORE_CUDA=$${PATCHSCORE_CUDA:-0} $(BIN)/python -m build --wheel --outdir build/wheel
	if [ "$$(uname)" = Linux ]; then PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair -w dist build/wheel/*.whl; \
	    else mkdir -p dist && cp build/wheel/*.whl dist; fi
	$(BIN)/twine check --strict dist/*.whl

wheel-test: wheel
	rm -rf build/wheel-env
	$(PYTHON) -m venv build/wheel-env
	build/wheel-env/bin/pip install -q $(CONSTRAINTS) dist/*.whl
	build/wheel-env/bin/python -I tests/wheel.py

clean:
	rm -rf $(VENV) build out site dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python $(INPUTS)
	$(BIN)/pip install -q $(CONSTRAINTS) -e .
	touch $@

# An extra of the package that is installed; by its name, so that nothing is built again.
$(VENV)/.installed-%: $(VENV)/.installed
	$(BIN)/pip install -q $(CONSTRAINTS) 'patchscore[$*]'
	touch $@
