# `make image` and `make test` work from a fresh clone: they make .venv, install, and go on.
PYTHON ?= python3
# Extra options of pip, for example another package index.
PIP_FLAGS ?=
PROMPT ?= a large red circle above a small blue square
PRESET ?= balanced
SEED ?= 1
MODELS := shapes-unet shapes-dit

BIN := .venv/bin
# Python compiles what is imported when it is: compiling all of torch beforehand takes longer than installing it.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile $(PIP_FLAGS)
SOURCES := pyproject.toml requirements/constraints.txt
# Where it must not write what it compiled (as in many containers), each of hundreds of processes compiles all of torch
# that it imports. Empty is unset to Python.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: image test test-slow test-machines gpu-kit install lint types bench readme docs wheel

image: .venv/.installed
	$(BIN)/fastdiff generate "$(PROMPT)" --preset $(PRESET) --seed $(SEED) -o out.png

# The tests check types too, on one processor while another goes on.
test: lint
	$(BIN)/python -m pytest -n auto --dist loadgroup --durations=40 --durations-min=2

test-slow: .venv/.installed-dev
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m pytest --hypothesis-profile searching tests/laws/test_predictors.py tests/caching/test_schedule.py \
		tests/caching/test_objectives.py

# The tests as other processors would run them. ROWS="default two-threads" runs these rows alone.
test-machines: .venv/.installed-dev
	$(BIN)/python scripts/test_machines.py $(addprefix --rows ,$(ROWS))

install: .venv/.installed-dev

lint: .venv/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/.installed-dev
	$(BIN)/mypy

bench: .venv/.installed-dev
	mkdir -p benchmarks
	for model in $(MODELS); do \
	  $(BIN)/fastdiff bench -m $$model --preset lossless --preset balanced --preset fast \
	    --json benchmarks/$$model.json --plot benchmarks/$$model.png --sheet benchmarks/$$model-sheet.png || exit 1; \
	done

readme: .venv/.installed-dev
	$(BIN)/python scripts/readme.py

# What a machine with its own torch lacks, for another Python if need be: scripts/bench_gpu.py says how to use it.
KIT_PYTHON ?= 3.12
KIT_PLATFORMS ?= manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64
KIT := diffusers pydantic pydantic-core annotated-types typing-inspection importlib_metadata zipp cache-dit torchao
gpu-kit: .venv/.made
	rm -rf build/gpu-kit
	$(BIN)/python -m pip download $(PIP_FLAGS) -q -c requirements/constraints.txt --no-deps --only-binary=:all: \
	  --implementation cp --python-version $(KIT_PYTHON) $(addprefix --platform ,$(KIT_PLATFORMS)) -d build/gpu-kit $(KIT)
	@du -sh build/gpu-kit

# Strict: a dead link fails. The tests build it too.
docs: .venv/.installed-dev
	$(BIN)/python -m mkdocs build

wheel: .venv/.installed-dev
	$(BIN)/python -m build

# Stamps: each step runs again only when what it depends on is newer.
.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit("fastdiff needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11" if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "this Python cannot make environments; on Debian: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: .venv/.made $(SOURCES)
	@echo "Installing into .venv; torch is the large part, so this takes a minute or more the first time."
	$(PIP) -c requirements/constraints.txt -e .
	@touch $@

.venv/.installed-dev: .venv/.made $(SOURCES)
	@echo "Installing into .venv, with the tools for tests; this takes a minute or more the first time."
	$(PIP) -c requirements/constraints.txt -e '.[dev]'
	@touch $@ .venv/.installed
