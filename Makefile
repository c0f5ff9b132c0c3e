# Everything runs in .venv, which is made on the first call; nothing is installed elsewhere.
#   make PYTHON=/path/to/python3.12 test      uses another interpreter
#   make OMP_NUM_THREADS=4 simulate           uses more cores

PYTHON ?= python3.11 python3
PY := .venv/bin/python
INSTALLED := .venv/.installed
EXPERIMENT := simulations/experiments/dba-mnist5k.toml
MATRIX := simulations/experiments/matrix-small.toml
ROOMS := none_core tasks client server simulations deployment benchmarks
WITH_DATA = $(if $(DATA_ROOT),--data-root $(DATA_ROOT))

# What the tools would otherwise write into the home folder, ask the network for, or report.
export FLWR_HOME := $(CURDIR)/.venv/flwr
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export MPLCONFIGDIR := $(CURDIR)/.venv/mpl
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0
# Threads of one process that wait for each other on a busy core cost far more than they gain, and
# sums in another order give other last digits.
export OMP_NUM_THREADS ?= 1

.DELETE_ON_ERROR:
.PHONY: help simulate deploy deploy-local bars matrix thresholds test lint audit fuzz bench clean

help:
	@echo "make simulate   the attack without and with the defence, and a comparison, into results/"
	@echo "make deploy-local   the defended run between processes with TLS, keys and a gateway"
	@echo "make deploy     the same between containers (a Docker engine and docker-compose)"
	@echo "make bars       every promised figure, three seeds each, into docs/bars.md (an hour;"
	@echo "                DATA_ROOT=folder for full MNIST)"
	@echo "make matrix     what decides among defences, attacks and data, into docs/results-small.md"
	@echo "                (40 minutes); MATRIX=simulations/experiments/matrix.toml for all of it"
	@echo "make thresholds how the thresholds do on held-out training images (an hour and a half)"
	@echo "make test       lint, types and tests"
	@echo "make lint       ruff and mypy"
	@echo "make audit      known weaknesses in the code (bandit) and in what it uses (pip-audit, if there"
	@echo "                is a network)"
	@echo "make fuzz       a hundred thousand hostile messages (about an hour); others for another"
	@echo "                FUZZ_SEED=number"
	@echo "make bench      time and memory of the defence, into results/bench"
	@echo "make clean      remove the environment, builds and caches; results/ is kept"

# 32 rounds are enough for the undefended attack to succeed. Defended, the attackers ignore what they
# are asked, attack in every round, and lie about what the model does on their data.
RUN := $(PY) -m simulations run $(EXPERIMENT) --set experiment.rounds=32

simulate: $(INSTALLED)
	$(RUN) --set 'defense.name="undefended"' --out results/undefended
	$(RUN) --set attack.obeys_filter=false --set 'attack.reporter="hide"' --out results/defended
	$(PY) -m simulations compare results/undefended results/defended --out results/compare

# The same run between a SuperLink, a gateway and ten SuperNodes; docs/deployment.md.
#   make deploy-local DEPLOY="--set 'defense.name=\"undefended\"'"
#   make deploy BASE=none-defense-base       with an image that docker/base.sh made
DEPLOY ?=
DEPLOYED = $(EXPERIMENT) --set experiment.rounds=32 --set attack.obeys_filter=false \
	--set 'attack.reporter="hide"' $(DEPLOY)

deploy-local: $(INSTALLED)
	$(PY) -m deployment local $(DEPLOYED) --out results/deployed-local

deploy: $(INSTALLED)
	$(PY) -m deployment containers $(DEPLOYED) --out results/deployed

bars: $(INSTALLED)
	$(PY) -m simulations matrix simulations/experiments/bars.toml $(WITH_DATA)

matrix: $(INSTALLED)
	$(PY) -m simulations matrix $(MATRIX) $(WITH_DATA)

thresholds: $(INSTALLED)
	$(PY) -m simulations matrix simulations/experiments/thresholds.toml

test: lint
	$(PY) -m pytest

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

audit: $(INSTALLED)
	$(PY) -m bandit --quiet --configfile pyproject.toml --recursive $(ROOMS)
	$(PY) .ci/audit.py constraints.txt
	$(PY) .ci/audit.py docker/cuda.lock

export FUZZ_SEED ?= 0
fuzz: $(INSTALLED)
	$(PY) -m pytest -m slow -rP tests/none_core/flower/test_fuzz.py

bench: $(INSTALLED)
	$(PY) -m benchmarks all --out results/bench

clean:
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A candidate counts only when it runs: a version manager may leave a name that starts nothing.
$(PY):
	@for candidate in $(PYTHON); do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "making .venv with $$candidate"; \
			exec "$$candidate" -m venv .venv; \
		fi; \
	done; \
	echo "Python 3.11 or newer is needed; none of these is one: $(PYTHON)" >&2; \
	echo "Name yours: make PYTHON=/path/to/python3" >&2; \
	exit 1

# Order-only: the interpreter is a link whose date says nothing about what is installed.
$(INSTALLED): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --quiet -c constraints.txt -e ".[simulation,privacy,dev]"
	touch $@
