# make demo   sets everything up, trains a model from nothing, draws pictures, writes runs/demo/report.html
# make test   sets everything up, then format, types, layers, docstrings and tests
# make bench  the benchmarks
# make test-faults   60 kills, full disks and damaged checkpoints over one run (FAULTS=200 FAULT_SEED=7)
#
# Another Python: make PYTHON=python3.12 demo

PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,\
	$(if $(shell $(p) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(p))) python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Busy waiting makes OpenMP collapse as soon as another process shares the cores.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test test-faults lint bench clean

demo: $(STAMP)
	$(BIN)/shoestring demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults tests/test_faults.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pydoclint --quiet src

bench: $(STAMP)
	@for file in benchmarks/*.py; do \
		grep -q __main__ $$file || continue; \
		echo "== $$file"; $(BIN)/python $$file || exit 1; \
	done

# Done again only when the project file or the pins change.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	"shoestring needs Python 3.11 or newer, and this one is %d.%d; try: make PYTHON=python3.11 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	@touch $(STAMP)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
