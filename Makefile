# Two commands for a bare machine with Python >= 3.11: `make reproduce` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SCALE ?= quick
OUT ?= results
NOTEBOOKS ?= notebooks
SITE ?= site

.PHONY: reproduce gallery test test-slow test-gpu lint types docs notebooks benchmark clean

# A virtual environment with the pinned versions; rebuilt when the pins change.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('tts_jax needs Python 3.11 or newer, this is ' + sys.version) if sys.version_info < (3, 11) else 0"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cpu]" --group dev
	touch $@

reproduce: $(VENV)/.installed
	$(BIN)/tts-jax reproduce all --scale $(SCALE) --out $(OUT)

# The images of docs/gallery.md; figure 4 there is the paper's scale.
gallery: $(VENV)/.installed
	$(BIN)/python docs/gallery.py --data $(OUT)/gallery

# A file stays with one worker: what it has compiled serves all its tests.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not gpu"

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadfile -m slow

# Needs JAX for CUDA in $(VENV); the workers share the GPU's memory.
test-gpu: $(VENV)/.installed
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(BIN)/python -m pytest -n 4 -m gpu tests/test_gpu.py

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed
	$(BIN)/pyright --pythonpath $(BIN)/python

# The pages open from the disk; their search needs a server, `python -m http.server -d site`.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir $(abspath $(SITE))

# Runs the scripts and writes the .ipynb of each beside it, or into another folder;
# TTS_JAX_NOTEBOOK_SCALE=full takes minutes.
notebooks: $(VENV)/.installed
	mkdir -p $(NOTEBOOKS)
	$(BIN)/python notebooks/_execute.py --out $(NOTEBOOKS)

benchmark: $(VENV)/.installed
	$(BIN)/python -m benchmarks.suite --out $(OUT)/benchmarks
	$(BIN)/python -m benchmarks.suite flow --out $(OUT)/benchmarks

clean:
	rm -rf $(VENV) results site
