# make train      sets up what training needs, trains with every loss, prints and plots the comparison
# make test       sets everything up, builds the extension, passes the tests
# make test-all   the same and the slow tests
# make test-versions  the tests of CPU and Triton kernels with the torch versions that are supported, oldest to newest
# make sanitize   the native tests with AddressSanitizer and UndefinedBehaviorSanitizer
# make nightly    the property tests on thousands of new examples, and every launch of the launcher's test
# make dist       a source distribution and a wheel, checked by installing it
# make gpu        on a machine with a GPU: its tests and times in 8 minutes, by the Python that is there (docs/gpu.md)
# make lint, make format, make clean
#
# PYTHON=python3.12 makes the environment with another Python. VENV=path uses an environment that is there: its torch
# stays, and only what it lacks is installed.
GIVEN_PYTHON := $(PYTHON)
ifndef PYTHON
PYTHON := $(shell tools/find_python.sh)
endif
VENV := .venv
BIN := $(abspath $(VENV))/bin
STAMPS := $(VENV)/stamps-lmf_kernels
# One environment for every command: ninja and clang-format are found beside Python.
export PATH := $(BIN):$(PATH)

SOURCES := $(wildcard csrc/* lmf_kernels/_build/*.py) setup.py pyproject.toml
MODULES := $(wildcard lmf_kernels/*.py lmf_kernels/*/*.py)
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu csrc/*.cuh)
# Of another kind of build, another stamp: CI asks for CUDA kernels.
BUILD := $(STAMPS)/build$(LMF_BUILD_CUDA)

# torch-Python of each environment.
VERSIONS := 2.8.0-3.10 2.11.0-3.12 2.15.0-3.13
VERSION_ENVIRONMENTS := .venv-versions

.PHONY: setup train test test-all test-versions sanitize nightly dist gpu lint format clean

setup: $(STAMPS)/dev $(BUILD)

$(STAMPS)/python:
	@tools/environment.sh "$(VENV)" "$(PYTHON)"
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/train: benchmarks/training/requirements.txt
$(STAMPS)/dev: requirements-dev.txt benchmarks/training/requirements.txt
$(STAMPS)/train $(STAMPS)/dev: $(STAMPS)/python
	$(BIN)/python tools/install.py $(firstword $(filter %.txt,$^))
	touch $@

# An environment that was there has a copy of the package, which goes out of date with any file of it.
$(BUILD): $(STAMPS)/train $(SOURCES) $(if $(wildcard $(VENV)/made-for-lmf_kernels),,$(MODULES))
	$(BIN)/python tools/install.py .
	touch $@

train: $(STAMPS)/train $(BUILD)
	$(BIN)/python benchmarks/train.py $(ARGS)

test: setup
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: test
	$(BIN)/python -m pytest -m "slow and not nightly" $(ARGS)
	HYPOTHESIS_PROFILE=ci $(BIN)/python -m pytest tests/test_properties.py $(ARGS)

nightly: setup
	$(BIN)/python -m pytest -m nightly $(ARGS)
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest tests/test_properties.py $(ARGS)

sanitize: $(STAMPS)/sanitize
	tests/sanitize.sh $(ARGS)

$(STAMPS)/sanitize: $(STAMPS)/dev $(SOURCES) $(MODULES)
	CC=gcc CXX=g++ LMF_BUILD_NATIVE=1 LMF_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-base build/sanitize \
		--build-lib build/sanitize/lib
	touch $@

test-versions: $(VERSIONS:%=test-version-%)

test-version-%: $(VERSION_ENVIRONMENTS)/%/stamps/install
	tests/versions.sh $(VERSION_ENVIRONMENTS)/$*

.PRECIOUS: $(VERSION_ENVIRONMENTS)/%/stamps/requirements $(VERSION_ENVIRONMENTS)/%/stamps/install
$(VERSION_ENVIRONMENTS)/%/stamps/requirements: requirements-versions.txt | $(STAMPS)/dev
	python=$$(tools/find_python.sh $(lastword $(subst -, ,$*))) && \
		uv venv --quiet --clear --seed --python $$python $(VERSION_ENVIRONMENTS)/$*
	uv pip install --quiet --python $(VERSION_ENVIRONMENTS)/$*/bin/python torch==$(firstword $(subst -, ,$*)) \
		--requirement requirements-versions.txt
	mkdir -p $(@D) && touch $@

# As a user would, and by way of a source distribution: it is built away from the clone, whose own build stays as it is.
# The machine's own constraints must not choose another torch.
$(VERSION_ENVIRONMENTS)/%/stamps/install: $(VERSION_ENVIRONMENTS)/%/stamps/requirements $(SOURCES) $(MODULES)
	rm -rf build/versions/$*
	LMF_BUILD_NATIVE=0 $(BIN)/python setup.py --quiet sdist --dist-dir build/versions/$*
	uv pip uninstall --quiet --python $(VERSION_ENVIRONMENTS)/$*/bin/python lmf_kernels
	PIP_CONSTRAINT=/dev/null LMF_BUILD_NATIVE=1 LMF_BUILD_CUDA=0 $(VERSION_ENVIRONMENTS)/$*/bin/python -m pip install --quiet \
		build/versions/$*/*.tar.gz
	touch $@

dist: $(STAMPS)/dev
	tools/dist.sh

# In the environment of python3, or of the PYTHON that is given; nothing is installed. The report runs the tests first
# and `python -m lmf_kernels build` after Triton's times.
gpu: export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu: export PYTHONUNBUFFERED := 1
gpu:
	$(or $(GIVEN_PYTHON),python3) benchmarks/gpu_report.py --measure-only $(ARGS)

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
	rm -rf build dist *.egg-info lmf_kernels/*.so lmf_kernels/_native.json results $(STAMPS)/build* $(STAMPS)/sanitize \
		$(VERSION_ENVIRONMENTS)
