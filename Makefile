# Needs Python 3.11 or 3.12 with pip on Linux x86_64, and nothing else. Each target makes the environment that it needs.
PYTHON ?= python3
DEMO_FLAGS ?=
MINUTES ?= 30

# An environment's stamp is named after what was installed, so that another lock makes it anew.
stamp = $(1)/installed-$(shell cat $(2) pyproject.toml | sha256sum | cut -c1-16)
MAIN := $(call stamp,.venv,requirements.lock)
OLD := $(call stamp,.venv-0.5.17,requirements-0.5.17.lock)
LINT := $(call stamp,.venv-lint,requirements.lock)

.PHONY: help demo test test-0.5.17 lint soak kits gpu-test install docker-test sbom audit
.DEFAULT_GOAL := help

help: ## print this
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(MAIN) ## find needles with a small trained model, under stock DSA and MISA, then serve it until Ctrl-C (ONCE=1 leaves; DEMO_FLAGS="…")
	.venv/bin/python -m sglang_misa.launch_server --demo $(DEMO_FLAGS)

test: lint $(MAIN) ## what continuous integration runs: lint, then every test that needs no GPU, on SGLang 0.5.23
	PATH="$$PATH:$(CURDIR)/.venv-lint/bin" .venv/bin/python -m pytest

test-0.5.17: $(OLD) ## the tests of patches and of real servers on SGLang 0.5.17
	.venv-0.5.17/bin/python -m pytest tests/patches tests/serving -m "not download"

lint: $(LINT) ## ruff and mypy; needs neither SGLang nor torch
	.venv-lint/bin/ruff check .
	.venv-lint/bin/ruff format --check .
	.venv-lint/bin/mypy

soak: $(MAIN) ## a mixed load with faults for MINUTES=30 on the CPU, page statistics watched; the report is soak.json
	.venv/bin/python -m sglang_misa.bench.soak --minutes $(MINUTES)

kits: $(MAIN) ## SGLang's own test kits on servers with MISA, on the CPU: what ran, and why the others cannot
	.venv/bin/python -m pytest tests/serving/sglang_kits.py -v -rA --show-capture=no

gpu-test: $(MAIN) ## kernels and servers on a machine with one Hopper GPU
	.venv/bin/python -m pytest -m gpu tests/gpu

install: $(MAIN) ## the environment of demo and test in .venv: 9 GB of packages, minutes the first time

environment = $(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit(f"expected Python 3.11 or 3.12, got {v[0]}.{v[1]}; use make PYTHON=python3.12 …")' && $(PYTHON) -m venv --clear $(@D)

$(MAIN) $(OLD):
	@$(environment)
	$(@D)/bin/python -m pip install -r $(if $(filter $@,$(OLD)),requirements-0.5.17.lock,requirements.lock)
	$(@D)/bin/python -m pip install --no-deps --no-build-isolation -e .
	touch $@

$(LINT):
	@$(environment)
	$(@D)/bin/python -m pip install -c requirements.lock -e '.[bench,deploy,dev]'
	touch $@

docker-test: $(MAIN) $(LINT) ## prove docker/ on Debian 12 as root, without Docker, GPU or image registry (tests/docker/prove.sh)
	PATH="$$PATH:$(CURDIR)/.venv-lint/bin" PYTHON=.venv/bin/python tests/docker/prove.sh

sbom: $(MAIN) $(LINT) ## sbom.json: the packages of requirements.lock, as CycloneDX
	.venv-lint/bin/cyclonedx-py environment .venv/bin/python -o sbom.json

audit: $(LINT) ## known vulnerabilities in requirements.lock; a package that the index says nothing of is a failure
	.venv-lint/bin/pip-audit --strict -r requirements.lock --no-deps --disable-pip
