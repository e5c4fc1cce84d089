# mlxgpt: `make train` and `make test` on a new machine with Python 3.11 or later, or uv.
# Works with the tools that Apple ships: make 3.81 and a plain sh.
#
#   make train                    Tiny Shakespeare from the hub, 5,000 steps, three samples
#   make train SOURCE=my.txt      the same on your own text
#   make train ARGS="--seed 2"    any flag of `mlxgpt train`
#   make test                     the tests
#   make torture                  the slow tests, which inject faults for hours
#   make torture PART=2/40        the second of 40 parts of them
#   make check                    format, lint, types
#   make report-machine           tests and measurements of your machine in one file: 20 minutes
#   make tier2-report             Tier 2 in full: training, quality and samples in one file: hours
#   make tier2-report RECIPE=modern     the same with another recipe

VENV := .venv
BIN := $(VENV)/bin
SOURCE :=
ARGS :=
PART := 1/1
RECIPE := classic

.PHONY: train test torture check report-machine tier2-report venv dev clean

train: venv
	@$(BIN)/mlxgpt train --tier 1 $(if $(SOURCE),--source "$(SOURCE)") $(ARGS)
	@echo && $(BIN)/mlxgpt generate --samples 3 --max-tokens 300
	@echo && echo 'to keep the model as one file that any browser runs: $(BIN)/mlxgpt export --to html'
	@echo 'to give mlxgpt commands yourself, first: source $(VENV)/bin/activate'

test: dev
	@$(BIN)/python -m pytest

torture: dev
	@$(BIN)/python -m pytest -m slow -rP --part $(PART)

check: dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

report-machine: dev
	@$(BIN)/python benchmarks/machine_report.py $(if $(SOURCE),--source "$(SOURCE)") $(ARGS)

# The same command resumes. `report` needs matplotlib, which the dev extra contains.
TIER2_RUN := tier2-$(RECIPE)-report
tier2-report: dev
	@$(BIN)/mlxgpt train --tier 2 --recipe $(RECIPE) --run $(TIER2_RUN) \
		$(if $(SOURCE),--source "$(SOURCE)") $(ARGS)
	@$(BIN)/mlxgpt eval --run $(TIER2_RUN) --quality
	@$(BIN)/mlxgpt report $(TIER2_RUN) --output $(TIER2_RUN).html

venv: $(VENV)/.installed
dev: $(VENV)/.installed-dev

# Stamp files: newer than pyproject.toml once its dependencies are installed, so that a second call
# installs nothing.
$(VENV)/.installed: pyproject.toml
	@$(call make_venv)
	@echo 'installing mlxgpt into $(VENV)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV)

# Use a Python 3.11 or later with venv (on a Mac one for Apple silicon), else uv, which installs one;
# else print how to get one.
define make_venv
sh .ci/check_system.sh || exit 1; \
if [ ! -x $(BIN)/python ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	rm -rf $(VENV); \
	for python in python3.13 python3.12 python3.11 python3 python3.14 python; do \
		if $$python -c $(SUITABLE) >/dev/null 2>&1 && $$python -m venv $(VENV); then break; fi; \
	done; \
	if [ ! -x $(BIN)/python ] && command -v uv >/dev/null 2>&1; then \
		uv venv --quiet --seed --python '>=3.11' $(VENV); \
	fi; \
	if [ ! -x $(BIN)/python ]; then \
		echo 'mlxgpt needs Python 3.11 or later: get one from python.org, or uv from docs.astral.sh/uv' >&2; \
		exit 1; \
	fi; \
fi
endef

SUITABLE := 'import os, sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11) or \
	(sys.platform == "darwin" and os.uname().machine != "arm64"))'
