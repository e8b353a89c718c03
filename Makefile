# make train      sets everything up, trains with every loss, prints and plots the comparison
# make test       sets everything up, builds the extension, passes the tests
# make test-all   the same and the slow tests;  make lint, make format;  make clean
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
# One environment for every command: ninja and clang-format are found beside Python.
export PATH := $(CURDIR)/$(BIN):$(PATH)

SOURCES := $(wildcard csrc/*) setup.py cuda_toolkit.py pyproject.toml
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu csrc/*.cuh)

.PHONY: setup train test test-all lint format clean

setup: $(STAMPS)/build

$(STAMPS)/requirements: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/build: $(STAMPS)/requirements $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

train: setup
	$(BIN)/python benchmarks/train.py $(ARGS)

test: setup
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: test
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: setup
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run --Werror $(CXX_FILES)

format: setup
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_FILES)

clean:
	rm -rf build *.egg-info lmf_kernels/*.so results $(STAMPS)/build
