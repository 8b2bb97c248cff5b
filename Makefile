# Bonsai Studio. `make start` installs what is needed and opens the studio; `make help` lists the rest.
#
# Settings you may pass on the command line or in the environment:
#   PYTHON          the Python to build the environment with (3.11 or newer; default: the first one found)
#   PIP_EXTRA_ARGS  further arguments for every `pip install`. Example, on a machine without an NVIDIA GPU:
#                   PIP_EXTRA_ARGS="--extra-index-url <address of PyTorch's CPU wheel index>"
#   ARGS            passed on to `manage.py up`, to pytest (make effects, make shots) or to the benchmark

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
TORCH := $(shell sed -n 's/^torch==//p' requirements.lock)
RUN_LOCK := requirements.lock
DEV_LOCK := requirements-dev.lock
# The stamps carry the checksum of the lock, so a changed lock installs again and an unchanged one costs nothing.
RUN_STAMP := $(VENV)/.installed-run-$(shell cat $(RUN_LOCK) | cksum | tr ' ' '-')
DEV_STAMP := $(VENV)/.installed-dev-$(shell cat $(RUN_LOCK) $(DEV_LOCK) | cksum | tr ' ' '-')
MIN_FREE_GB := 6
INSTALL_LOG := var/log/install.log

RESULTS := var/test-results
# Checks never touch the database and the artifacts of the person who runs them.
TEST_HOME := var/test-home

# Two torch processes that spin-wait on the same cores run ten times slower: checks get one thread each.
CHECK_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false \
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 BONSAI_HOME=$(CURDIR)/$(TEST_HOME)
PYTEST := $(CHECK_ENV) $(PY) -m pytest
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist worksteal
STAGES := lint types architecture engine-unit engine-conformance jobs studio e2e

.PHONY: help start env env-dev test $(addprefix test-,$(STAGES)) bench bench-events drills conformance effects shots lock format clean

help: ## Show this list
	@echo "Bonsai Studio: train, prune, graft and merge neural networks in the browser."
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

start: env ## Install if needed, then run the studio until Ctrl-C
	@exec $(PY) manage.py up $(ARGS)

env:
	@$(call ensure,$(RUN_STAMP),$(RUN_LOCK))

env-dev:
	@$(call ensure,$(DEV_STAMP),$(DEV_LOCK))
	@touch $(RUN_STAMP)

test: env-dev ## Check style, types and every test; prints the wall time of each stage
	@rm -rf $(RESULTS) $(TEST_HOME) && mkdir -p $(RESULTS) $(TEST_HOME); \
	failed=""; times=""; began=$$(date +%s); \
	for stage in $(STAGES); do \
		echo; echo "== $$stage"; from=$$(date +%s); \
		$(MAKE) --no-print-directory test-$$stage || failed="$$failed $$stage"; \
		took=$$(( $$(date +%s) - from )); times="$$times$$(printf '  %-20s %5d s' $$stage $$took)\n"; \
	done; \
	echo; echo "Wall time"; printf "$$times"; \
	printf '  %-20s %5d s\n' total $$(( $$(date +%s) - began )); \
	$(PY) tests/closing_line.py $(RESULTS) $$(( $$(date +%s) - began )); \
	if [ -n "$$failed" ]; then echo "Failed:$$failed"; exit 1; fi

test-lint:
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

test-types:
	@$(CHECK_ENV) $(PY) -m mypy

test-architecture:
	@$(PYTEST) tests/architecture --junitxml=$(RESULTS)/architecture.xml

test-engine-unit:
	@$(PYTEST) tests/engine/unit $(PARALLEL) -m "not effects" --junitxml=$(RESULTS)/engine-unit.xml

test-engine-conformance:
	@$(PYTEST) tests/engine/conformance $(PARALLEL) -m "not effects" --junitxml=$(RESULTS)/engine-conformance.xml

test-jobs:
	@$(PYTEST) tests/jobs $(PARALLEL) --junitxml=$(RESULTS)/jobs.xml

test-studio:
	@$(PYTEST) tests/studio $(PARALLEL) --junitxml=$(RESULTS)/studio.xml

test-e2e:
	@$(PYTEST) tests/e2e -k "not shots" --junitxml=$(RESULTS)/e2e.xml

conformance: env-dev ## Check the whole conformance list over every registered method
	@$(PYTEST) tests/engine/conformance $(PARALLEL) $(ARGS)

effects: env-dev ## Measure each method against its baseline (long) and rewrite docs/benchmarks/effects.md
	@$(PYTEST) tests/engine -m effects --effects-table docs/benchmarks/effects.jsonl $(ARGS)

shots: env-dev ## Take the screenshots of the pages with a real browser
	@$(PYTEST) tests/e2e -k shots $(ARGS)

bench: env-dev ## Measure every goal (about half an hour on two cores) and rewrite docs/benchmarks
	@OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 $(PY) manage.py bench $(ARGS)

bench-events: env-dev ## Ten thousand events a second for half a minute; rewrites docs/benchmarks/events.md
	@OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 $(PY) manage.py bench events

# How often each drill strikes; 0 means at every single place.
DRILLS := BONSAI_DRILL_SECONDS=inf BONSAI_DRILL_KILLS=$(or $(KILLS),200) BONSAI_DRILL_DISK=$(or $(DISK),0) BONSAI_DRILL_DAMAGE=1000 BONSAI_DRILL_CLOCK=10 BONSAI_DRILL_LOCK=10 \
	BONSAI_DRILL_WATCHERS=100
DRILL_ROWS := $(RESULTS)/drills.jsonl

drills: env-dev ## Kill, fill the disk, damage, move the clock, lock, watch (an hour); rewrites docs/benchmarks/drills.md
	@mkdir -p $(RESULTS) $(TEST_HOME) && rm -f $(DRILL_ROWS); failed=0; \
	$(DRILLS) BONSAI_DRILL_ROWS=$(CURDIR)/$(DRILL_ROWS) $(PYTEST) -q tests/engine/unit/test_drill_disk.py tests/engine/unit/test_drill_damage.py \
		tests/jobs/test_drill_clock.py tests/jobs/test_drill_locked.py tests/jobs/test_kill_drill.py $(ARGS) || failed=1; \
	$(DRILLS) BONSAI_DRILL_ROWS=$(CURDIR)/$(DRILL_ROWS) $(PYTEST) -q tests/e2e/test_drill_watchers.py $(ARGS) || failed=1; \
	BONSAI_DRILL_ROWS=$(DRILL_ROWS) $(PY) -m tests.drills || failed=1; exit $$failed

format: env-dev ## Sort imports and format the code
	@$(PY) -m ruff check --fix --quiet . ; $(PY) -m ruff format .

lock: ## Resolve pyproject.toml afresh and write both lock files
	@$(find_python); rm -rf var/lock && mkdir -p var && "$$python" -m venv var/lock
	@var/lock/bin/python -c '$(print_requirements)' > var/lock/run.in
	@var/lock/bin/python -c '$(print_requirements)' dev > var/lock/dev.in
	var/lock/bin/python -m pip install -q $(PIP_EXTRA_ARGS) "$$(grep '^torch==' var/lock/run.in)"
	var/lock/bin/python -m pip install -q $(PIP_EXTRA_ARGS) -r var/lock/run.in
	@var/lock/bin/python -m pip freeze -q | $(portable_pins) > var/lock/run.txt
	var/lock/bin/python -m pip install -q $(PIP_EXTRA_ARGS) -c var/lock/run.txt -r var/lock/dev.in
	var/lock/bin/python -m pip check
	@var/lock/bin/python -m pip freeze -q | $(portable_pins) | grep -vxFf var/lock/run.txt > var/lock/dev.txt
	@{ echo "# Written by \`make lock\` from pyproject.toml. torch first: its build (CPU or CUDA) follows the machine."; \
		grep '^torch==' var/lock/run.txt; grep -v '^torch==' var/lock/run.txt; } > $(RUN_LOCK)
	@{ echo "# Written by \`make lock\` from pyproject.toml: what the checks need on top of requirements.lock."; \
		echo "-r $(RUN_LOCK)"; cat var/lock/dev.txt; } > $(DEV_LOCK)
	@rm -rf var/lock; echo "Wrote $(RUN_LOCK) and $(DEV_LOCK)."

clean: ## Remove the environment and caches; your data in var/ stays
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis test-results $(RESULTS) $(TEST_HOME)
	@find engine jobs studio tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Removed the environment and the caches. Your data in var/ was not touched."

# --- how the environment is made -------------------------------------------------------------------------------------

# Sets $$python to the first interpreter that is new enough, or says what to do.
define find_python
python=""; for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
		python=$$(command -v "$$candidate"); break; fi; done; \
if [ -z "$$python" ]; then \
	echo "No Python 3.11 or newer was found (looked for: $(or $(PYTHON),python3 python3.13 python3.12 python3.11))."; \
	echo "Install Python 3.11, or say where it is: make start PYTHON=/path/to/python3.11"; exit 1; fi
endef

# $(1) stamp file, $(2) lock file. Does nothing when the stamp is there and the interpreter still works.
define ensure
[ -f $(1) ] && [ -x $(PY) ] && exit 0; \
$(find_python); \
free=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1048576) }'); \
if [ "$$free" -lt $(MIN_FREE_GB) ]; then \
	echo "The disk has $$free GB free, and the installation needs $(MIN_FREE_GB) GB (PyTorch is the largest part)."; \
	echo "Free some space, or move the project to a larger disk, and run the command again."; exit 1; fi; \
mkdir -p $(dir $(INSTALL_LOG)); : > $(INSTALL_LOG); \
if ! [ -x $(PY) ] || ! $(PY) -m pip --version >/dev/null 2>&1; then \
	echo "Making an isolated environment in $(VENV) with $$("$$python" --version) ..."; \
	if ! "$$python" -m venv --clear $(VENV) >> $(INSTALL_LOG) 2>&1; then \
		echo "The environment could not be made: this Python lacks its venv module (see $(INSTALL_LOG))."; \
		echo "On Debian and Ubuntu install it with: apt-get install python3-venv"; exit 1; fi; fi; \
install() { \
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_EXTRA_ARGS) "$$@" >> $(INSTALL_LOG) 2>&1 && return 0; \
	grep -v 'is ignored: it is neither' $(INSTALL_LOG) | tail -n 5; echo; \
	if grep -qiE 'No space left|Errno 28' $(INSTALL_LOG); then \
		echo "The disk filled up during the installation. Free some space and run the command again."; \
	elif grep -qiE 'NewConnectionError|Name or service not known|name resolution|timed out|ConnectTimeout|Network is unreachable|ProxyError|Connection refused|No matching distribution' $(INSTALL_LOG); then \
		echo "The package index could not be reached, or does not have this version."; \
		echo "Check the network (and pip's proxy or index settings), then run the command again; it continues where it stopped."; \
	else \
		echo "pip could not install the packages; the lines above say why."; \
		echo "Correct the cause and run the command again; it continues where it stopped."; fi; \
	echo "The full log is in $(INSTALL_LOG)."; exit 1; }; \
echo "Installing PyTorch $(TORCH) (about 1 GB on disk, 5 GB with CUDA) ..."; install "torch==$(TORCH)"; \
echo "Installing the other packages ..."; install "torch==$(TORCH)" -r $(2); \
rm -f $(VENV)/.installed-*; touch $(1); echo "The environment is ready."
endef

# Prints the requirements of pyproject.toml, or of the extra named as argument, one a line.
print_requirements = import sys, tomllib; \
	project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	extra = sys.argv[1:]; \
	print(*(project["optional-dependencies"][extra[0]] if extra else project["dependencies"]), sep="\n")

# torch brings the CUDA packages that fit the machine; pinning them would break every machine without a GPU.
portable_pins = awk '/^(nvidia-|cuda-|triton==)/ && !/^nvidia-ml-py==/ { next } { sub(/\+(cpu|cu[0-9]+)$$/, ""); print }'
