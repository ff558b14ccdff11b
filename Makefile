# `make bench`, `make demo`, `make test` work in a fresh clone: they use the virtual environment or conda
# environment that is active, else make one in .venv, install torch where there is none, and build.

# What to install where there is no torch. A CPU build is enough; on a machine with an NVIDIA GPU
# install the torch you want beforehand, it is left alone.
TORCH ?= torch==2.13.0
# Used only to create .venv.
PYTHON ?= python3
# Tests in parallel processes:  make test WORKERS=  for one after the other.
WORKERS ?= --numprocesses auto --maxprocesses 8 --dist worksteal
# Arguments for memeff-bench, memeff-demo, pytest:  make bench ARGS="--model gemma-2-2b"
ARGS ?=

ENVIRONMENT := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),$(CURDIR)/.venv)
BIN := $(ENVIRONMENT)/bin
# A stamp per set of extras, newer than every file whose change asks for a new build.
STAMP := $(ENVIRONMENT)/.memeff
BUILT_FROM := $(shell find csrc buildtools -type f -not -name '*.pyc') setup.py pyproject.toml

# Two targets at once would be two pip processes in one environment.
.NOTPARALLEL:
.PHONY: help bench demo test ctest sanitize fuzz emulate ptxas verify-gpu lint format docs clean

help:
	@echo "make bench      the loss of this library against the standard way, on this machine"
	@echo "make demo       train a small language model with both"
	@echo "make test       every test"
	@echo "make ctest      the C++ tests only;  make sanitize: the same with ASan and UBSan"
	@echo "make fuzz       random calls of any size, SECONDS=60, BACKEND=cpu or emulated"
	@echo "make emulate    the CUDA kernels in the emulator (see tests/kernels)"
	@echo "make ptxas      registers, shared memory and occupancy of the CUDA kernels into docs/ptxas.txt"
	@echo "make verify-gpu everything that needs a GPU, results into OUT=folder"
	@echo "make docs       the documentation into build/site"
	@echo "make lint       what CI checks about style and types;  make format: mend what can be mended"

$(BIN)/python:
	$(PYTHON) -m venv $(ENVIRONMENT)

# $(STAMP)-x: memeff is installed with the extra x, built from the sources as they are.
$(STAMP)-%: $(BUILT_FROM) | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install "$(TORCH)"
	@echo "Building memeff into $(ENVIRONMENT), about a minute"
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

bench: $(STAMP)-bench
	$(BIN)/memeff-bench $(ARGS)

demo: $(STAMP)-bench
	$(BIN)/memeff-demo $(ARGS)

test: $(STAMP)-test
	@if command -v cmake > /dev/null; then $(MAKE) ctest; else echo "no cmake: C++ tests left out"; fi
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

# Other calls each time (tests/fuzz); a failure says how to repeat it.
SECONDS ?= 60
BACKEND ?= cpu
fuzz: $(STAMP)-test
	$(BIN)/python tests/fuzz/fuzz.py --seconds $(SECONDS) --backend $(BACKEND) $(ARGS)

# The CUDA kernels on the CPU, checked; needs the headers of a CUDA toolkit.
emulate:
	cmake -S tests/kernels -B build/kernels \
	  $(addprefix -DPython3_EXECUTABLE=,$(wildcard $(BIN)/python))
	cmake --build build/kernels --parallel 2
	ctest --test-dir build/kernels --parallel 2 --output-on-failure

# Needs nvcc, no GPU; some minutes.
ptxas:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) scripts/ptxas_report.py $(ARGS)

# Builds and installs nothing outside this folder.
verify-gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) scripts/verify_gpu.py $(ARGS) \
	  $(or $(OUT),$(error OUT=folder for the results is missing))

lint: $(STAMP)-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	@echo clang-format; $(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: $(STAMP)-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP_FILES)

# Reads the sources, so nothing is built.
docs: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --requirement docs/requirements.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

CPP_FILES = $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Without CUDA: setup.py compiles the kernels, and verify-gpu those of the C++ tests that need a GPU.
CMAKE_FLAGS ?= -DMEMEFF_WERROR=ON -DMEMEFF_CUDA=OFF
JOBS ?= $(shell nproc)

ctest:
	cmake -S . -B build/cmake $(CMAKE_FLAGS)
	cmake --build build/cmake --parallel $(JOBS)
	ctest --test-dir build/cmake --parallel $(JOBS) --output-on-failure
	@ln -sf build/cmake/compile_commands.json compile_commands.json

sanitize:
	cmake -S . -B build/sanitize $(CMAKE_FLAGS) -DMEMEFF_SANITIZE=address,undefined
	cmake --build build/sanitize --parallel $(JOBS)
	ctest --test-dir build/sanitize --parallel $(JOBS) --output-on-failure

clean:
	rm -rf build *.egg-info memeff/*.so compile_commands.json $(STAMP)-*
