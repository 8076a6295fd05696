# `make train` and `make test` are all that a new machine with Python 3.11 to 3.13 needs.
PYTHON ?= python3
BIN := .venv/bin

# Large pages for what a step allocates: on Linux a twentieth of a step's time goes into small ones (docs/PERFORMANCE.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: train test lint tpu-compiler
.DELETE_ON_ERROR:

train: .venv/installed
	$(BIN)/python train.py --config=configs/radial_nano.py --workdir=runs/radial_nano

test: .venv/installed-dev lint
	$(BIN)/python -m pytest -n auto --dist=worksteal

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# What tests of programs for TPUs need besides; without it they are skipped.
tpu-compiler: .venv/installed-tpu

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

.venv/installed-tpu: .venv/installed requirements-tpu.txt
	$(BIN)/python -m pip install --quiet -r requirements-tpu.txt
	touch $@
