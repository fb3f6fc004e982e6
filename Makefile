# Every target does all its set-up from nothing. Needs Python >= 3.11 and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test test-browser test-docs test-lowest families test-transformers lint install bench clean

help:  ## show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: $(VENV)/.installed  ## make .venv with everything

# torch first and by version: an open range would take a build with gigabytes of CUDA packages where a CPU build will do.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps "$$(grep '^lmms-eval==' constraints.txt)"  # see `test` in pyproject.toml
	touch $@

demo: $(VENV)/.installed  ## build, train, evaluate and use a tiny SafeVLM; ARGS="--fast --seed 1"
	$(BIN)/safevlm demo --output demo $(ARGS)

test: $(VENV)/.installed  ## run the tests, offline, on the CPU
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not browser and not documents" $(ARGS)

test-lowest: $(LOWEST)/.installed  ## run them with the lowest versions of all packages (Python 3.11 or 3.12)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(LOWEST)/bin/python -m pytest \
		-n 2 --dist worksteal -p no:cacheprovider $(ARGS)

# The venv ignores itself: ruff and git are not to look into it.
$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	echo "*" > $(LOWEST)/.gitignore
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip
	$(LOWEST)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints-lowest.txt)"
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable ".[test]"
	touch $@

test-browser: $(VENV)/.installed  ## run the Space's tests in headless Chromium
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/space -m browser $(ARGS)

test-docs: $(VENV)/.installed  ## run all that the documents tell people to type
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/docs -m documents $(ARGS)

families: $(VENV)/.installed  ## run the matrix of model families and write its table
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadgroup \
		tests/modeling/test_families.py --family-table modeling_safevlm/README.md

test-transformers: $(VENV)/.installed  ## run transformers' own common tests on SafeVLM, with the native models as control
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python tests/transformers_common/run.py $(ARGS)

lint: $(VENV)/.installed  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed  ## measure what the safety path costs
	$(BIN)/python tests/benchmarks/overhead.py $(ARGS)

clean:  ## remove what the targets made
	rm -rf $(VENV) $(LOWEST) demo build *.egg-info
