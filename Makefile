# make train      sets everything up, trains with every loss, prints and plots the comparison
# make test       sets everything up, builds the extension, passes the tests
# make test-all   the same and the slow tests
# make sanitize   the native tests with AddressSanitizer and UndefinedBehaviorSanitizer
# make test-oldest  the CPU tests in a second environment with the oldest torch that is supported
# make nightly    the property tests on thousands of new examples
# make gpu        on a machine with a GPU: its tests and times in 8 minutes, by the Python that is there (docs/gpu.md)
# make lint, make format, make clean
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
# One environment for every command: ninja and clang-format are found beside Python.
export PATH := $(CURDIR)/$(BIN):$(PATH)

SOURCES := $(wildcard csrc/*) setup.py cuda_toolkit.py pyproject.toml
MODULES := $(wildcard lmf_kernels/*.py)
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu csrc/*.cuh)

OLDEST := .venv-oldest
# Those that need neither Triton nor datasets.
OLDEST_TESTS := $(patsubst %,tests/test_%.py,edges layouts reductions ops pairwise precision backward errors modules \
	margins recipes reference oracle properties threads import fuzz)

.PHONY: setup train test test-all sanitize test-oldest nightly gpu lint format clean

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
	HYPOTHESIS_PROFILE=ci $(BIN)/python -m pytest tests/test_properties.py $(ARGS)

nightly: setup
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest tests/test_properties.py $(ARGS)

sanitize: $(STAMPS)/sanitize
	tests/sanitize.sh $(ARGS)

$(STAMPS)/sanitize: $(STAMPS)/requirements $(SOURCES) $(MODULES)
	CC=gcc CXX=g++ LMF_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-base build/sanitize \
		--build-lib build/sanitize/lib
	touch $@

test-oldest: $(OLDEST)/stamps/install
	PYTHONSAFEPATH=1 $(OLDEST)/bin/python -c "import lmf_kernels as l, torch; \
		print(torch.__version__, l.__file__); assert '$(OLDEST)' in l.__file__"
	PYTHONSAFEPATH=1 $(OLDEST)/bin/python -m pytest -m "not slow" $(OLDEST_TESTS) $(ARGS)

$(OLDEST)/stamps/requirements: requirements-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --requirement requirements-oldest.txt
	mkdir -p $(OLDEST)/stamps && touch $@

# By way of a source distribution: it is built away from the clone, whose own build stays as it is.
$(OLDEST)/stamps/install: export PATH := $(CURDIR)/$(OLDEST)/bin:$(PATH)
$(OLDEST)/stamps/install: export LMF_BUILD_CUDA := 0
$(OLDEST)/stamps/install: $(OLDEST)/stamps/requirements $(SOURCES) $(MODULES)
	rm -rf build/oldest
	$(OLDEST)/bin/python setup.py --quiet sdist --dist-dir build/oldest
	$(OLDEST)/bin/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall build/oldest/*.tar.gz
	touch $@

# In the environment of PYTHON, or of python3 where that is missing; nothing is installed. The report runs the tests
# first and `python -m lmf_kernels build` after Triton's times.
gpu: export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu: export PYTHONUNBUFFERED := 1
gpu:
	python=$$(command -v $(PYTHON) || command -v python3) && $$python benchmarks/gpu_report.py --measure-only $(ARGS)

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
	rm -rf build *.egg-info lmf_kernels/*.so results $(STAMPS)/build $(STAMPS)/sanitize $(OLDEST)
