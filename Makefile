# Everything runs in .venv, made from constraints.txt; `make gpu` uses the interpreter's own packages instead.
PYTHON ?= python3
PYTEST_WORKERS ?= auto
PYTEST_ARGS ?=
OUT ?= bench/results/local

VENV := .venv
INSTALLED := $(VENV)/.installed
CPP_SOURCES := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h csrc/*.cuh)

.DEFAULT_GOAL := help
.PHONY: help demo test lint gpu clean

help:
	@echo "make demo   train a routed language model on real text, ablate it, report (minutes, 2 CPU cores)"
	@echo "make test   lint, then every test this machine can run (PYTEST_WORKERS, PYTEST_ARGS)"
	@echo "make lint   ruff, mypy, clang-format"
	@echo "make gpu    tests that need CUDA, then the demo; offline, with the packages of PYTHON (OUT)"
	@echo "make clean  remove what building and testing leave behind; .venv stays"

$(INSTALLED): pyproject.toml setup.py constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -e ".[test,demo]" -c constraints.txt
	touch $@

demo: $(INSTALLED)
	$(VENV)/bin/python examples/demo.py

# One thread a worker: the workers already fill the cores.
test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
ifneq ($(CPP_SOURCES),)
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_SOURCES)
endif

# A failing test does not cost the demo's numbers; the target fails in the end all the same.
gpu:
	$(PYTHON) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make gpu: no CUDA device')"
	$(PYTHON) -m pip install --no-build-isolation --no-deps -e .
	mkdir -p "$(OUT)"
	status=0; \
	$(PYTHON) -m pytest -m gpu -q --junitxml="$(OUT)/gpu-tests.xml" || status=$$?; \
	$(PYTHON) examples/demo.py --out "$(OUT)" || status=$$?; \
	exit $$status

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
