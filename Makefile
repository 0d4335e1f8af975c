# Everything a person or a CI needs; `make help` lists it. Python packages come from the index that pip is set up with.

PYTHON ?= python3
PYTHON312 ?= 3.12
VENV := .venv
BIN := $(VENV)/bin
MADE := $(shell cat $(VENV)/.uv 2>/dev/null)
ifneq ($(or $(MADE),$(CURDIR)),$(CURDIR))
$(warning $(VENV) was made in $(MADE), whose code it runs: if that is another copy, rm -rf $(VENV))
endif
# Nothing here phones home.
export FLWR_TELEMETRY_ENABLED := 0
export RAY_USAGE_STATS_ENABLED := 0
# Compiled once at installation, not by each of many kernels: importing torch takes half the time.
export UV_COMPILE_BYTECODE := 1

.DEFAULT_GOAL := help
.PHONY: help install quickstart lab test test-all bench lint lock export tensorboard ray s3prl fastabx

help: ## this list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## create .venv and install the bench into it

quickstart: $(VENV)/.installed ## run the whole bench on the built-in corpus and print the results (minutes)
	$(BIN)/fedhubert run params/quickstart.yaml

lab: $(VENV)/.installed ## open JupyterLab on the notebooks, on this machine only
	$(BIN)/jupyter lab --ip=127.0.0.1 --LabApp.default_url=/lab/tree/notebooks

test: $(VENV)/.installed-test ## the quick tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/.installed-test ## the slow tests only: what `make test` leaves out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder

bench: $(VENV)/.installed-test ## time the parts that have to be fast against their peers, on an idle machine
	for file in benchmarks/bench_*.py; do echo "$$file"; $(BIN)/python "$$file" || exit 1; done

export: $(VENV)/.installed ## add what `fedhubert export` needs: transformers and ONNX
	$(ADD) transformers onnx onnxruntime onnxscript

tensorboard: $(VENV)/.installed ## add TensorBoard: FEDHUBERT_TENSORBOARD=outputs/tensorboard has curves written for it
	$(ADD) tensorboard

ray: $(VENV)/.installed ## add the engine `ray`
	$(ADD) ray

gpu: ## what one GPU does with all this, in eight minutes; needs torch, and make gpu-wheels where more is missing
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(GPU)

gpu-wheels: $(VENV)/.uv ## collect what `make gpu` needs beside torch, for a machine without network (45 MB)
	rm -rf benchmarks/wheels && mkdir benchmarks/wheels
	sed -n 's/ *\\$$//; /==/p' requirements.lock > benchmarks/wheels/versions.txt
	$(BIN)/pip download --quiet --only-binary=:all: --python-version 3.12 --implementation cp \
		$(foreach glibc,2_17 2_28,--platform manylinux_$(glibc)_x86_64) --platform manylinux2014_x86_64 \
		--constraint benchmarks/wheels/versions.txt --dest benchmarks/wheels \
		flwr pydantic soundfile psutil pyyaml ruamel.yaml praatio filelock safetensors threadpoolctl espeakng-loader
	rm benchmarks/wheels/numpy-* benchmarks/wheels/uv-* benchmarks/wheels/versions.txt  # with torch there is the first

s3prl: $(VENV)-s3prl/.installed ## an environment for s3prl, which needs an older torch (about 5 GB)

fastabx: $(VENV)-fastabx/.installed ## an environment for fastabx, with which ABX is compared, on Python 3.12 (5 GB)

lint: $(VENV)/.installed-test ## style, plain mistakes, types, and the library's size and structure
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/size.py

lock: $(VENV)/.uv ## write the lock files anew after a change of pyproject.toml (delete them first to upgrade)
	$(LOCK) --extra synthetic --output-file requirements.lock pyproject.toml
	$(LOCK) --all-extras --constraint requirements.lock --output-file requirements-test.lock pyproject.toml
	$(LOCK) --output-file requirements-s3prl.lock requirements-s3prl.in
	$(subst 3.11,3.12,$(LOCK)) --output-file requirements-fastabx.lock requirements-fastabx.in

# Packages of the extras at the versions that are tested. `pip install '.[export]'` would put a copy in the place of the
# bench that is edited here.
ADD := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements-test.lock

# Universal: one file for all systems and Python versions. No index is written down, so any will do.
LOCK := UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
	--generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate

# Stamps, so that nothing is installed twice.

$(VENV)/.uv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedhubert needs Python 3.11 or later: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "uv==0.13.*"
	echo "$(CURDIR)" > $@

$(VENV)/.installed: requirements.lock pyproject.toml $(VENV)/.uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

$(VENV)/.installed-test: requirements-test.lock $(VENV)/.installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements-test.lock
	touch $@

$(VENV)-fastabx/.installed: requirements-fastabx.lock $(VENV)/.uv
	$(BIN)/uv venv --quiet --allow-existing --python $(PYTHON312) $(VENV)-fastabx
	$(BIN)/uv pip install --quiet --python $(VENV)-fastabx/bin/python --require-hashes -r requirements-fastabx.lock
	touch $@

$(VENV)-s3prl/.installed: requirements-s3prl.lock $(VENV)/.uv
	$(BIN)/uv venv --quiet --allow-existing --python 3.11 $(VENV)-s3prl
	$(BIN)/uv pip install --quiet --python $(VENV)-s3prl/bin/python --require-hashes -r requirements-s3prl.lock
	touch $@
