# Everything runs in .venv, made from constraints.txt; `make gpu` uses the interpreter's own packages instead.
# Building reads GRADROUTE_CUDA, CMAKE_CUDA_ARCHITECTURES, MAX_JOBS and others, see setup.py.
PYTHON ?= python3
PYTEST_WORKERS ?= auto
PYTEST_ARGS ?=
GPU_WORKERS ?= 8
BENCH_ARGS ?=
OUT ?= bench/results/local

VENV := .venv
BUILD_TOOLS := $(VENV)/.build-tools
INSTALLED := $(VENV)/.installed
NEWEST_WHEEL = $$(ls -t dist/*.whl | head -n 1)
CPP_SOURCES := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h csrc/*.cuh tests/emulation/*.cpp tests/emulation/*.h)

.DEFAULT_GOAL := help
.PHONY: help demo experiments test lint sanitize gpu wheel check-wheel clean

help:
	@echo "make demo   train a routed language model on real text, ablate it, report (minutes, 2 CPU cores)"
	@echo "make experiments  the experiments of examples/, and the README's paragraphs about them (half an hour)"
	@echo "make test   lint, then every test this machine can run (PYTEST_WORKERS, PYTEST_ARGS)"
	@echo "make lint   ruff, mypy, clang-format"
	@echo "make sanitize  the native module's tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make gpu    tests that need CUDA, the benchmarks on it, the demo; offline, with the packages of PYTHON (OUT,"
	@echo "            BENCH_ARGS=--resume goes on with benchmarks that were cut short)"
	@echo "make wheel  one wheel in dist/, for PYTHON; no torch is needed"
	@echo "make check-wheel  install that wheel into an empty environment, test it there, and see what it links"
	@echo "make clean  remove what building and testing leave behind; .venv stays"

$(BUILD_TOOLS): constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install setuptools pybind11 cmake ninja -c constraints.txt
	touch $@

# Without build isolation, which would bring other headers each time and so compile everything again.
$(INSTALLED): $(BUILD_TOOLS) pyproject.toml setup.py $(wildcard csrc/*)
	$(VENV)/bin/python -m pip install --no-build-isolation -e ".[test]" -c constraints.txt
	touch $@

demo: $(INSTALLED)
	$(VENV)/bin/python examples/demo.py

# One whose effect fails does not cost the others' results; the target fails in the end all the same.
experiments: $(INSTALLED)
	status=0; \
	for name in split_autoencoder era_unlearning sgtm_mixed steering_scalar oversight; do \
		$(VENV)/bin/python examples/$$name.py || status=$$?; \
	done; \
	$(VENV)/bin/python examples/report.py || status=$$?; \
	exit $$status

# One thread a worker: the workers already fill the cores.
test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_SOURCES)

# The sanitizers' runtimes come before the interpreter's libraries. Leaks are not asked for: Python and torch have some.
SANITIZED := build/sanitized
sanitize: $(INSTALLED)
	$(VENV)/bin/cmake -S csrc -B $(SANITIZED) -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DGRADROUTE_SANITIZE=ON \
		-DGRADROUTE_CUDA=OFF -DPython_EXECUTABLE="$(abspath $(VENV)/bin/python)"
	$(VENV)/bin/cmake --build $(SANITIZED)
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	$(VENV)/bin/python tests/sanitized.py $(SANITIZED)/_native*.so -q -p no:cacheprovider tests/test_native.py

# A failing test does not cost the demo's numbers; the target fails in the end all the same. Most of a test's time is
# the compilation of its kernels, which goes side by side; tests that need all of the GPU's memory go one by one.
gpu:
	$(PYTHON) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make gpu: no CUDA device')"
	$(PYTHON) -m pip install --no-build-isolation --no-deps -e .
	mkdir -p "$(OUT)"
	status=0; \
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m gpu -q -n $(GPU_WORKERS) --dist loadgroup --junitxml="$(OUT)/gpu-tests.xml" || status=$$?; \
	$(PYTHON) -m bench run h200 --out "$(OUT)" $(BENCH_ARGS) || status=$$?; \
	$(PYTHON) examples/demo.py --out "$(OUT)" || status=$$?; \
	exit $$status

# build/lib may hold modules that are gone from the sources, and setuptools would pack them.
wheel: $(BUILD_TOOLS)
	rm -rf build/lib* build/bdist*
	$(VENV)/bin/python -m pip wheel -v --config-settings=quiet=1 --no-build-isolation --no-deps -w dist .
	@wheel=$(NEWEST_WHEEL); tag=$${wheel#*-*-}; echo "$$wheel: tag $${tag%.whl}, $$(du -k "$$wheel" | cut -f1) kB"

check-wheel: $(BUILD_TOOLS)
	@test -d dist || { echo "make check-wheel: no wheel in dist/, make wheel builds one" >&2; exit 1; }
	$(VENV)/bin/python .ci/check_wheel.py $(NEWEST_WHEEL)

clean:
	rm -rf gradroute/_native* $(INSTALLED) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
