# One command each: `make quickstart`, `make test`, `make lab`. All of them make `.venv` first if it is not there.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
JOBS ?= 2
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed

# One thread a process: two processes on two cores run five times faster so than when both use both.
export OMP_NUM_THREADS ?= 1
# Nothing here may reach for the network, ask for a name, or report home.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 \
	DISABLE_TELEMETRY=1 WANDB_MODE=disabled TOKENIZERS_PARALLELISM=false

.PHONY: help venv quickstart test evidence-check fuzz audit explore lab docs clean
help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 20

venv: $(STAMP)  ## .venv with the pinned requirements

$(STAMP): settings.ini constraints.txt setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "videotg_r1 needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not there):" \
			"try 'make PYTHON=python3.11 $(MAKECMDGOALS)'" >&2; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "installing the pinned requirements into .venv: about 1.5 GB, some minutes"
	@$(BIN)/python -m pip install --disable-pip-version-check -qq -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(STAMP)  ## the whole method on two CPU cores; ends with reports/quickstart/index.html
	@echo "about 8 minutes on two idle cores; from another terminal: $(BIN)/vtg watch quickstart"
	@$(OFFLINE) $(BIN)/vtg run params/quickstart.yaml --jobs $(JOBS)

test: $(STAMP)  ## export and clean change nothing, ruff, the notebooks (of nbs/explore two), then pytest
	@$(OFFLINE) bash .ci/gate $(BIN)

explore: $(STAMP)  ## every explore notebook, top to bottom; in JupyterLab and a browser too where playwright and chromium are there
	$(OFFLINE) $(BIN)/nbdev_test nbs/explore --n-workers $(JOBS) --timing
	VTG_EXPLORE=1 $(OFFLINE) $(BIN)/python -m pytest tests/test_browser.py || test $$? -eq 5  # 5: no browser, all skipped

evidence-check: $(STAMP)  ## every number of reports/evidence-*/README.md anew from the committed cells
	$(OFFLINE) $(BIN)/python -m pytest -q tests/test_evidence.py -k "computed or small"

FUZZ ?= 10000
MUTANTS ?= 2000
SOAK ?= 20000
STEPS ?= 2000
fuzz: $(STAMP)  ## every parser on FUZZ inputs, MUTANTS damaged videos, SOAK decodes and STEPS steps of GRPO in one process; half an hour
	$(OFFLINE) $(BIN)/python tests/fuzz/targets.py $(FUZZ) --atheris
	$(OFFLINE) $(BIN)/python tests/fuzz/mutants.py $(MUTANTS) --workers $(JOBS)
	$(OFFLINE) $(BIN)/python tests/fuzz/soak.py $(SOAK)
	$(OFFLINE) $(BIN)/python tests/fuzz/soak.py --grpo $(STEPS)

audit:  ## constraints.txt against published advisories; needs the network: pip-audit has no data of its own and asks the package index
	@$(PYTHON) -m venv .cache/audit && .cache/audit/bin/python -m pip install --disable-pip-version-check -qq pip-audit==2.10.1
	@.cache/audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip --strict --progress-spinner off || { \
		echo "audit: an advisory is named above, or its data could not be had (then nothing was audited: try where the package index can be reached)" >&2; exit 1; }

lab: $(STAMP)  ## JupyterLab on this folder, with ARGS; notebooks are cleaned on save
	JUPYTER_CONFIG_DIR="$(CURDIR)/.jupyter" $(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

docs: $(STAMP)  ## the documentation site; ends with docs/_build/html/index.html
	@$(BIN)/python -m pip install --disable-pip-version-check -qq -c constraints.txt -e '.[docs]'
	$(OFFLINE) $(BIN)/python docs/build.py && echo "$(CURDIR)/docs/_build/html/index.html"

clean:  ## removes runs and caches; keeps .venv and reports
	rm -rf runs .cache build docs/_build *.egg-info .pytest_cache .ruff_cache
