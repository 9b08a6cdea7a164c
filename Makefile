# make demo     fine-tune on this machine and measure it          make test   everything CI checks but lint
# make bench    benchmarks against rivals                         make lint   ruff, clang-format, mypy
# make sweep   the fused loss, and packed batches, on every architecture of transformers
# make wheel    one wheel for every Python >= 3.10, torch >= 2.10
# make gpu-check PYTHON=python3    build, test and measure with the torch of that Python, on its GPU

# The environment that demo, test and bench make for themselves. TORCH is pinned: an unpinned torch brings gigabytes of CUDA.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --no-compile
READY := $(VENV)/.ready
LINTERS := $(VENV)/.linters

.PHONY: demo test lint format bench sweep wheel gpu-check native clean

demo: native
	$(BIN)/python examples/finetune.py

test: native
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: $(LINTERS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')
	$(BIN)/mypy

format: $(LINTERS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

bench: native
	$(PIP) --no-deps trl==1.16.0 bitsandbytes
	$(BIN)/python benchmarks/record.py --machine cpu --only linear_cross_entropy cross_entropy linear_log_probs
	$(BIN)/python benchmarks/record.py --machine cpu --only adamw
	$(BIN)/python benchmarks/record.py --machine cpu --only attention collator boundaries plan
	$(BIN)/python benchmarks/memory.py --machine cpu

sweep: native
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -r f -n 2 -m sweep tests/test_architectures.py \
		--architectures benchmarks/results/architectures.md
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "sweep or not sweep" tests/test_packing_matrix.py \
		--packing-matrix benchmarks/results/packing.md

wheel: $(LINTERS)
	$(BIN)/python -m build --wheel --outdir dist

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

# rebuilds only what changed: ninja follows the sources
native: $(READY)
	@FASTFT_CXXFLAGS=-Werror $(BIN)/python setup.py -q build_ext --inplace

$(READY): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) ninja setuptools -e ".[bench]"
	touch $@

$(LINTERS): $(READY)
	$(PIP) ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5 build
	touch $@

clean:
	rm -rf build dist out fastft/_lib $(VENV) *.egg-info
