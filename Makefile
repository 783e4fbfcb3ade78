# make demo       trains, evaluates and asks a tiny model; downloads packages only
# make test       ruff and the suite
# make test-slow  the tests that take long: several processes, populations
# make readme     every command of README.md and docs/, small
# make clean      removes the installed packages; runs stay
# make chaos      every fault at its full count, hours; ROWS="R2 fuzz-squad"
# make mutants    one-line changes that tests must notice, an hour; ROWS="heads"
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart

ROWS ?=

.PHONY: demo test test-slow readme chaos mutants clean

demo: .venv/installed
	$(BIN)/python -m experiments.train --config=configs/quickstart.py \
	  --workdir=$(RUN)
	$(BIN)/python -m experiments.demo --workdir=$(RUN)

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder \
	  -m "not slow"

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder \
	  -m slow

readme: .venv/installed-dev
	$(BIN)/python -m tests.project.readme_commands

chaos: .venv/installed-dev
	$(BIN)/python -m tests.chaos $(ROWS)

mutants: .venv/installed-dev
	$(BIN)/python -m tests.mutants $(ROWS)

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv
