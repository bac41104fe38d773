PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test quickstart style clean

# Lint, formatting and the whole test suite, the slow tests included.
test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# The whole system on real-format data: report, figures and two models in runs/quickstart.
quickstart: $(VENV)/.installed
	$(BIN)/python examples/quickstart/quickstart.py

# Fixes what test's first two lines complain about.
style: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch goes first and alone, so that the pinned build is in place before anything else asks for torch.
$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rqsid needs Python 3.11 or newer; set PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
