# Two doors: `make demo` and `make test`. Each needs Python 3.11 or 3.12 with pip on Linux x86_64, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-$(shell sha256sum requirements.lock pyproject.toml | sha256sum | cut -c1-16)

.PHONY: demo test lint gpu-test install
.DEFAULT_GOAL := demo

demo: install
	$(BIN)/python -m sglang_misa.launch_server --demo $(DEMO_FLAGS)

test: lint
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On a machine with one Hopper GPU.
gpu-test: install
	$(BIN)/python -m pytest -m gpu tests/gpu

install: $(INSTALLED)

# 9 GB of packages: minutes the first time, skipped while the lock stays as it is.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit(f"expected Python 3.11 or 3.12, got {v[0]}.{v[1]}; use make PYTHON=python3.12 …")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -r requirements.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	touch $@
