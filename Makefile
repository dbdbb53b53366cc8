# make install | demo | reproduce-demo | test | lint | clean        PYTHON=python3.12 make install   chooses the interpreter
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo reproduce-demo test lint clean

install: $(STAMP)

# Runs again only when one of these files changed, and then pip keeps what is already right.
# setuptools and wheel come first: fvcore, iopath and antlr4 have no wheels and are built with the pinned ones.
$(STAMP): requirements.txt setup.py tools/install_detectron2.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: dimaskdino needs Python 3.10 or newer, and $(PYTHON) is %d.%d: run PYTHON=/path/to/python3 make install" % sys.version_info[:2])'
	@echo "== [1/4] virtual environment $(VENV)"
	$(BIN)/python -m pip --version 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@echo "== [2/4] requirements.txt (some gigabytes the first time: torch)"
	$(BIN)/python -m pip install $$(grep -E '^(pip|setuptools|wheel)==' requirements.txt)
	$(BIN)/python -m pip install --no-build-isolation -r requirements.txt
	@echo "== [3/4] detectron2"
	$(BIN)/python tools/install_detectron2.py
	@echo "== [4/4] dimaskdino"
	$(BIN)/python -m pip install --no-build-isolation -e .
	@touch $(STAMP)
	@echo "== installed; 'make demo' and 'make test' are next"

demo: $(STAMP)
	$(BIN)/python tools/demo.py

# The paper's Table 4 and Figure 1 on synthetic pictures: four trainings of half the demo's length, on the CPU.
reproduce-demo: $(STAMP)
	$(BIN)/python tools/reproduce.py table4 figure1 --dataset shapes --num-gpus 0 --run

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Trained models under output/ are left alone.
clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
