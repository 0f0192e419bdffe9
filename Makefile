# One way to do each chore. `make run` needs Python >= 3.10 and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= a red apple, glossy style
# A seed whose picture is plain to see; OPTIONS= draws another one each time.
OPTIONS ?= --seed 7
# A file's tests stay together, since they share what was converted; each process computes on one core.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile

.PHONY: run test quick check types lint bench faults fuzz licences audit docs clean

run: $(VENV)/.runtime
	@$(BIN)/edge-sd generate "$(PROMPT)" $(OPTIONS)

test: check
	$(PYTEST) -m "not long"

quick: $(VENV)/.dev
	$(PYTEST) -m "not slow and not long"

check: lint types

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy follows the package's folder mapping only in an installed copy.
types: $(VENV)/.dev
	rm -rf build && $(BIN)/pip install --quiet --no-deps --target build/types .
	MYPYPATH=build/types $(BIN)/mypy -p edge_sd

bench: $(VENV)/.dev
	$(BIN)/python -m edge_sd bench

# Every fault in full numbers (tests/faults/account.py), and the tests that are too long for `make test`: an hour on two
# cores. Writes the page with the table.
faults: $(VENV)/.dev
	$(PYTEST) -m "fault or long" --all-faults --faults-page=docs/faults.md

# Every reader of strangers' bytes for five minutes (tests/faults/fuzz.py); what is found becomes a test.
SECONDS ?= 300
fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.faults.fuzz --seconds $(SECONDS)

# Licences of all that is installed for development, and what is known against the pinned versions (asks OSV's server).
licences: $(VENV)/.supply
	$(BIN)/pip-licenses --from=mixed --order=license --format=markdown

audit: $(VENV)/.supply
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

# The pages of docs/ and the reference, in build/site.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo build/site/index.html

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'edge-sd needs Python 3.10 or newer; try make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)

# Editors don't follow an editable install, which maps folders by code; a .pth file shows them the package.
SHOW_EDITORS = echo "$(CURDIR)" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/edge_sd_source.pth"

$(VENV)/.runtime: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@$(SHOW_EDITORS)
	touch $@

# The CPU build of torch first and by version: unpinned, it would bring gigabytes of CUDA. optimum-intel without its
# dependencies: it asks for torchvision, whose wheel does not load beside a CPU build of torch, and runs without it.
$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[convert,train,coreai,dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps optimum optimum-intel open_clip_torch k-diffusion
	@$(SHOW_EDITORS)
	touch $@ $(VENV)/.runtime

$(VENV)/.supply: pyproject.toml constraints.txt | $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[supply]"
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/.runtime
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
