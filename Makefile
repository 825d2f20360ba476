# The two commands of the README do all their own set-up:
#
#   make demo    create .venv, install, train the default recipe with differential privacy
#   make test    create .venv, install, then lint, types and tests
#
# A second call skips the set-up unless pyproject.toml or constraints.txt changed.
# Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
# A file's tests share what is slow to make, so they go to one worker. Compiled files are kept whatever
# the environment says: without them every process that a test starts would compile the package anew.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo reviews quick test lint format dist docs zoo bench peers clean

help:  ## list these targets
	@sed -n 's/^\([a-z]*\):.*  ## \(.*\)/  make \1\t\2/p' Makefile

demo: $(VENV)/.demo  ## train the default recipe with differential privacy; see runs/demo
	$(BIN)/dptorch train --name demo --overwrite

reviews: $(VENV)/.reviews  ## classify movie reviews with privacy, by a pretrained encoder
	$(BIN)/dptorch train --recipe reviews --name reviews --overwrite

quick: $(VENV)/.test  ## ruff and the quick tests, two minutes on 2 cores; types are in make lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -n 2 --hypothesis-profile quick -m "not (slow or postgres or browser or zoo)"

# mypy has one process: beside the tests it does not leave the other core without work.
test: $(VENV)/.test  ## lint, types and all tests: fifteen minutes on 2 cores
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/mypy >$(VENV)/types.txt 2>&1 & mypy=$$!; \
	$(PYTEST) -n 2; tests=$$?; \
	wait $$mypy; types=$$?; cat $(VENV)/types.txt; exit $$((tests ? tests : types))

lint: $(VENV)/.test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test  ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dist: $(VENV)/.test  ## wheel and sdist into dist/, each tried without a compiler
	$(BIN)/python -m tests.dist

docs: $(VENV)/.docs  ## build the documentation as a site; fails on a dead link
	$(BIN)/python -m website

zoo: $(VENV)/.test  ## every image model against a loop, a step of the command; writes docs/zoo.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.zoo
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.zoo --command
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.overfit

bench: $(VENV)/.test  ## time and memory of a private step, ours and others'; writes docs/cost.md
	$(BIN)/dptorch bench --docs

peers: $(VENV)/.test  ## other libraries' tests and examples on the adapters; writes docs/compatibility.md
	$(BIN)/python -m tests.peers opacus=$(OPACUS) fastdp=$(FASTDP) private-transformers=$(PRIVATE_TRANSFORMERS) private-vision=$(PRIVATE_VISION)

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else "dptorch needs Python 3.10 or newer, $(PYTHON) is %d.%d: try make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)

# A stamp is written only after pip succeeded, so an interrupted install is taken up again.
$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing dptorch into $(VENV) (a few minutes the first time)"
	$(PIP) -e '.[report]'
	@touch $@

$(VENV)/.reviews: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing dptorch and a pretrained encoder into $(VENV) (a few minutes the first time)"
	$(PIP) -e '.[report,reviews]'
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing dptorch and the site's tools into $(VENV) (a few minutes the first time)"
	$(PIP) -e '.[report,docs]'
	@touch $@ $(VENV)/.demo

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing dptorch and its test tools into $(VENV) (a few minutes the first time)"
	$(PIP) -e '.[report,transformers,trl,text,vision,prv,bench,deepspeed,postgres,serve,onnx,docs,notebooks,dev]'
	@touch $@ $(VENV)/.demo $(VENV)/.docs
