# make demo    train a model split over NP=2 processes
# make test    all tests; PYTEST_ARGS="-k plan" chooses some
# make lint    flake8, isort, mypy
# make bench   the benchmarks
# make setup   what all of them need; PYTHON=python3.11 TENSORFLOW=2.18 choose others,
#              and .venv keeps that TensorFlow until another one is chosen
# make clean   remove what was built

PYTHON ?= python3
TENSORFLOW ?=
NP ?= 2
BIN := .venv/bin
PYTHON_FILES := smp_tf tests benchmarks setup.py .ci/setup

# TensorFlow's notices drown what a rank says; TF_CPP_MIN_LOG_LEVEL=0 brings them back.
export TF_CPP_MIN_LOG_LEVEL ?= 3
export TF_USE_LEGACY_KERAS := 1

# An empty HOME makes "~" the root folder; without HOME it is what the password file says.
ifeq ($(HOME),)
unexport HOME
endif

.PHONY: setup demo test lint bench clean
.NOTPARALLEL:

setup:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "setup: no $(PYTHON); on Debian: apt install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) .ci/setup --tensorflow "$(TENSORFLOW)"

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" \
	  horovodrun --gloo -np $(NP) $(BIN)/python -m smp_tf.examples.digits

# The C++ tests of the engine first: when they fail, nothing above them is worth reading.
test: setup
	@PYTHON=$(BIN)/python kernels/tests/run.sh
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup
	@$(BIN)/python -m flake8 $(PYTHON_FILES)
	@$(BIN)/python -m isort --check-only --diff -q $(PYTHON_FILES)
	@$(BIN)/python -m mypy

bench: setup
	@$(BIN)/python benchmarks/send_recv.py
	@$(BIN)/python benchmarks/step_overhead.py
	@$(BIN)/python benchmarks/trace_time.py
	@$(BIN)/python benchmarks/memory.py
	@$(BIN)/python benchmarks/plan_vs_measured.py
	@$(BIN)/python benchmarks/partition_quality.py
	@$(BIN)/python benchmarks/pipeline_speedup.py
	@$(BIN)/python benchmarks/live_memory.py
	@$(BIN)/python benchmarks/link_delay.py
	@$(BIN)/python benchmarks/hybrid.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache smp_tf/transport/*.so
	find smp_tf tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
