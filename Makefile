# `make demo` and `make test` do everything, from a fresh clone, in .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: demo test lint sweep clean

demo: $(VENV)/.installed
	$(RUN)/python recipes/demo.py

test: lint
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest

lint: $(VENV)/.installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

sweep: $(VENV)/.installed
	$(RUN)/python recipes/sweep.py --table recipes/results/demo_sweep.md

# torch first and pinned: left to itself, pip would take a build with several gigabytes of CUDA libraries.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet -c constraints.txt torch
	$(RUN)/python -m pip install --quiet -c constraints.txt -e ".[recipes,test]"
	touch $@

clean:
	rm -rf $(VENV) out
