# One target a job; each target creates .venv on a fresh machine. `make lint` never edits; `make format` does.
PYTHON ?= python3
# Any pip requirement, options included: see "Choosing the torch build" in README.md.
TORCH ?= torch==2.13.0
VENV ?= .venv
# For a GPU machine: the folder of missing wheels, the folder of results, and the parts to run (all by default).
WHEELS ?= build/wheels
OUT ?= bench/results
PARTS ?=
# The number of fuzzed cases, and their seed.
CASES ?= 100000
SEED ?= 0
# The number of test processes; 0 runs the tests in pytest's own process.
JOBS ?= logical
BIN := $(VENV)/bin
# A change of torch or pyproject.toml repeats the set-up; a change of native sources repeats the build.
TORCH_STAMP = $(VENV)/.torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.installed
NATIVE := setup.py CMakeLists.txt $(shell find csrc -type f)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# An idle process takes tests from another one. With whole files, a long last file would leave cores idle.
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal
CLANG_SOURCES = $(shell find csrc tests bench -name '*.c' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup demo test test-slow test-all test-models sanitize sanitize-part sanitize-threads fuzz lint format docs bench gpu wheels dist matrix clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    DP-fine-tune a small speech recogniser on this machine, print WER and epsilon, write a report"
	@echo "make test    run the default tests on all cores (at most 8); JOBS=0 runs them in one process"
	@echo "make test-slow  run the other tests: more sizes and layouts, wheel builds, real widths, recipes"
	@echo "make test-all  run both; make test-models, which is in neither, judges every model of docs/models.md in an hour"
	@echo "make sanitize  run the native tests and fuzzed cases with gcc's address and undefined-behaviour sanitizers"
	@echo "make sanitize-part  the part of it that .ci/run has; make sanitize-threads: data races, by ThreadSanitizer"
	@echo "make fuzz    run CASES=100000 random cases on native kernels and damaged files, from SEED=0; it can be resumed"
	@echo "make lint    check with ruff, mypy and clang-format, and change nothing"
	@echo "make format  rewrite the sources with ruff and clang-format"
	@echo "make docs    build the documentation site in build/docs; warnings are errors"
	@echo "make bench   benchmark private steps against Opacus and non-private training on this machine"
	@echo "make gpu     build, test and benchmark on a GPU machine, without set-up; WHEELS=folder OUT=folder"
	@echo "make wheels  download the packages that such a machine lacks into WHEELS, for its Python 3.12"
	@echo "make dist    build the sdist and the wheels of a release in dist/, and test each in a bare environment"
	@echo "make matrix  test the supported versions of Python, torch and the libraries, each in a fresh environment"
	@echo "make setup   only create $(VENV) and install into it"
	@echo "make clean   remove everything that was built; the next job builds again"
	@echo "TORCH='torch==2.13.0' chooses the torch build, PYTHON=python3.12 the interpreter, VENV=.venv the folder"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is missing or older than 3.11; fix: make PYTHON=python3.11 (or newer)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "error: $(PYTHON) cannot create virtual environments; fix: apt-get install python3-venv, or python3.N-venv for PYTHON=python3.N (Debian, Ubuntu)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(TORCH_STAMP): | $(VENV)/bin/python
	@echo "installing $(TORCH)"
	$(PIP) $(TORCH)
	@rm -f $(VENV)/.torch-* && touch $@

$(STAMP): pyproject.toml $(NATIVE) $(TORCH_STAMP)
	@echo "building the kernels and installing what the tests and the demo need"
	$(PIP) --editable '.[dev]'
	@$(BIN)/python -c 'from dpkernels.backends.native_ops.native import library as l; r = l("cpu").reason; r and print("WARNING: slower:", r)' >&2
	@touch $@

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/asr-finetune demo

test: $(STAMP)
	$(PYTEST)

test-slow: $(STAMP)
	$(PYTEST) -m "slow and not models"

test-all: $(STAMP)
	$(PYTEST) -m "not models"

# Needs torchvision and timm: pip install -e '.[models]'.
test-models: $(STAMP)
	$(BIN)/python -m pytest -m models

sanitize: $(STAMP)
	$(BIN)/python -m tests.sanitize

sanitize-part: $(STAMP)
	$(BIN)/python -m tests.sanitize --part

sanitize-threads: $(STAMP)
	$(BIN)/python -m tests.sanitize --threads

fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz --cases $(CASES) --seed $(SEED) --resume

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CLANG_SOURCES)

docs: $(STAMP)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --jobs auto docs build/docs
	@echo "the site: build/docs/index.html"

bench: $(STAMP)
	$(BIN)/python -m pytest --benchmark

# A GPU machine has its own torch and no package registry, so this target skips the set-up above.
gpu:
	WHEELS='$(WHEELS)' OUT='$(OUT)' $(PYTHON) -m bench.gpu.run $(PARTS)

# --no-deps: the GPU machine keeps its own torch and triton.
wheels: | $(VENV)/bin/python
	$(BIN)/python -m pip --disable-pip-version-check download --quiet --no-deps --only-binary=:all: \
	  --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	  --dest '$(WHEELS)' --requirement bench/gpu_wheels.txt

# It makes environments of its own, and needs none of what the set-up installs.
dist: | $(VENV)/bin/python
	$(BIN)/python scripts/dist.py --torch '$(TORCH)'

matrix: $(STAMP)
	$(BIN)/python -m tests.matrix

format: $(STAMP)
	$(BIN)/ruff check --fix-only --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CLANG_SOURCES)

clean:
	rm -rf build dist *.egg-info dpkernels/lib $(STAMP)
