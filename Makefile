# make demo · make test · make lint · make gpu-test. Each makes .venv from requirements.lock first, and skips it when
# nothing changed. PYTHON=python3.12 make … chooses the interpreter.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed-$(shell cat requirements.lock pyproject.toml | cksum | cut -d' ' -f1)
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint gpu-test install

install: $(STAMP)

$(STAMP):
	@echo "installing SGLang and its dependencies into $(VENV) (about 9 GB, minutes)"
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 12), f"expected Python 3.11 or 3.12, got {sys.version.split()[0]}; set PYTHON=python3.12"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install --no-deps -r requirements.lock
	$(BIN)/python -m pip install --no-deps --editable .
	rm -f $(VENV)/.installed-* && touch $@

demo: $(STAMP)
	$(BIN)/python -m sglang_misa.launch_server --demo $(ARGS)

test: lint
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-test: $(STAMP)
	$(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)
