PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
TP ?= 8
DCP ?= 8
VENV := .venv
BIN := $(VENV)/bin
DEMO := examples/demo-model

.PHONY: demo test test-container format docs pictures notebooks evidence clean

demo: $(VENV)/.server  ## serve a small DeepSeek-V2 on the CPU
	$(BIN)/minidcp serve $(DEMO) --device cpu --ranks threads --tp-size $(TP) --dcp-size $(DCP) \
		--host $(HOST) --port $(PORT)

test: $(VENV)/.dev  ## lint, type-check and test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2

test-container: $(VENV)/.dev  ## build the image and test it; needs root on Debian
	tests/container/run $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.docs  ## build the site with the course, and run its notebooks
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	$(BIN)/python docs/tools/check_site.py build/site

pictures: $(VENV)/.docs  ## draw the course's pictures anew
	$(BIN)/python docs/tools/make_pictures.py

notebooks: $(VENV)/.docs  ## write the course's chapters as .ipynb
	$(BIN)/python docs/tools/notebooks.py

evidence: $(VENV)/.dev  ## measure everything on the GPUs of this machine; EVIDENCE has more flags
	$(BIN)/python benchmarks/evidence.py --out build/evidence $(EVIDENCE)

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/.server: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[server]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("minidcp needs Python 3.11 or newer; try: make PYTHON=python3.12" \
		if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
