# make demo    sets everything up, trains the demo model and writes runs/demo/report.html
# make test    sets everything up and runs the tests (make test-all: the slow ones too)
# make check   lint, format and types
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := 2.13.0
DEMO := runs/demo

.PHONY: demo test test-all check format bench bench-gpu install clean
.DELETE_ON_ERROR:

install: $(STAMP)

# torch is pinned here: where it is missing, an unpinned install could fetch a much larger build.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
	  || { echo "Python 3.11 to 3.13 is needed: make PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet torch==$(TORCH)
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/blockdiff prepare python-docs --out $(DEMO)-data
	$(BIN)/blockdiff train recipes/demo.yaml $$(test -e $(DEMO)/config.yaml && echo --resume)
	$(BIN)/blockdiff eval $(DEMO) --data $(DEMO)-data --estimator exact --json $(DEMO)/eval.json
	$(BIN)/blockdiff sample $(DEMO) --stream --seed 1 --top-p 0.9 --max-new-tokens 96 --prompt "Return the"
	$(BIN)/blockdiff report $(DEMO)
	@echo "Open $(DEMO)/report.html in a browser."

# A process per core, each with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist loadscope

test: $(STAMP)
	$(PYTEST)

test-all: $(STAMP)
	$(PYTEST) -m ''

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.machine
	$(BIN)/python -m benchmarks.training_step --dtypes float32 bfloat16
	$(BIN)/python -m benchmarks.sampling_speed --tokens-per-step 1 2 4 --dtypes float32 bfloat16 int8
	$(BIN)/python -m benchmarks.sampling_speed --tokens-per-step 1 4 --batches 8 16 --dtypes bfloat16
	$(BIN)/python -m benchmarks.engine_speed
	$(BIN)/python -m benchmarks.length_scaling
	$(BIN)/python -m benchmarks.estimate

# On a GPU: training steps, and sampling.
bench-gpu: $(STAMP)
	$(BIN)/python -m benchmarks.training_gpu
	$(BIN)/python -m benchmarks.sampling_gpu

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .pyrefly_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
