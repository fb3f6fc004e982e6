# Every target sets itself up from scratch. Needs Python >= 3.11 and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
NEWEST := .venv-newest
TORCH := $(shell sed -n 's/.*"\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)
export TOKENIZERS_PARALLELISM := false
OFFLINE := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1
PYTEST := -m pytest -n 2 --dist worksteal

.PHONY: help demo test test-browser test-docs test-lowest test-newest families test-transformers lint install lock bench clean

help:  ## show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: $(VENV)/.installed  ## create .venv with all packages of lock.txt

# First pip and setuptools, then everything else by hash: nothing is resolved, and only locked packages are used to build.
# torch is installed separately: the hashes of its CPU and CUDA builds differ between indexes, and pip checks all hashes
# or none. By then a CPU build's dependencies are installed.
$(VENV)/.installed: pyproject.toml lock.txt
	$(PYTHON) -m venv $(VENV)
	sed -n -E '/^(pip|setuptools)==/,/[^\]$$/p' lock.txt > $(VENV)/tools.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement $(VENV)/tools.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --requirement lock.txt
	$(BIN)/python -m pip install --quiet --no-warn-conflicts $(TORCH)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .  # hides a warning about editable installs
	touch $@

lock: $(VENV)/.installed  ## renew lock.txt; for one package only: ARGS="--upgrade-package peft"
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --group engine --no-emit-package torch \
		--generate-hashes --no-annotate --custom-compile-command "make lock" $(or $(ARGS),--upgrade) pyproject.toml --output-file lock.txt

demo: $(VENV)/.installed  ## build, train, evaluate and use a tiny SafeVLM; ARGS="--fast --seed 1"
	$(BIN)/safevlm demo --output demo $(ARGS)

test: $(VENV)/.installed  ## run the tests, offline, on the CPU
	$(OFFLINE) $(BIN)/python $(PYTEST) -m "not browser and not documents" $(ARGS)

test-lowest: $(LOWEST)/.installed  ## run the tests with the lowest versions of all packages (Python 3.11 or 3.12)
	$(OFFLINE) $(LOWEST)/bin/python $(PYTEST) -p no:cacheprovider $(ARGS)

# A .gitignore in the venv keeps ruff and git out of it.
$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	echo "*" > $(LOWEST)/.gitignore
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip
	$(LOWEST)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints-lowest.txt)"
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable ".[test]"
	touch $@

# Recreated each time, since the newest versions change.
test-newest:  ## run the tests with the newest releases that pyproject.toml allows, and list those not in lock.txt
	$(PYTHON) -m venv --clear $(NEWEST)
	echo "*" > $(NEWEST)/.gitignore
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST)/bin/python -m pip install --quiet --editable ".[test]"
	$(NEWEST)/bin/python -m pip install --quiet --no-deps --group engine
	@sed -n -E 's/^([^ ]+==[^ ]+) .*/\1/p' lock.txt > $(NEWEST)/locked.txt
	@echo "Not as in lock.txt:"; $(NEWEST)/bin/python -m pip freeze --exclude-editable | grep -vixFf $(NEWEST)/locked.txt || true
	$(OFFLINE) $(NEWEST)/bin/python $(PYTEST) -m "not browser and not documents" -p no:cacheprovider $(ARGS)

test-browser: $(VENV)/.installed  ## run the Space's tests in headless Chromium
	$(OFFLINE) $(BIN)/python -m pytest tests/space -m browser $(ARGS)

test-docs: $(VENV)/.installed  ## run everything that the documents tell people to type
	$(OFFLINE) $(BIN)/python $(PYTEST) tests/docs -m documents $(ARGS)

families: $(VENV)/.installed  ## run the tests of all model families and write their table
	$(OFFLINE) $(BIN)/python -m pytest -n 2 --dist loadgroup \
		tests/modeling/test_families.py --family-table modeling_safevlm/README.md

test-transformers: $(VENV)/.installed  ## run transformers' own common tests on SafeVLM, with its native models as control
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python tests/transformers_common/run.py $(ARGS)

lint: $(VENV)/.installed  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed  ## measure the cost of the safety path
	$(BIN)/python tests/benchmarks/overhead.py $(ARGS)

clean:  ## remove everything that the targets made
	rm -rf $(VENV) $(LOWEST) $(NEWEST) demo build *.egg-info
