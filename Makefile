# Two commands for newcomers: make quickstart, make test. Everything runs inside .venv, which is made when missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS ?= runs

.DEFAULT_GOAL := help
.PHONY: help quickstart video-quickstart test lint format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("vgen needs Python 3.11 or newer; set PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.installed

quickstart: $(VENV)/.installed ## handwritten digits from pixels to a scored sample grid, about 5 minutes on 2 CPU cores
	$(BIN)/python train.py experiment=digits_tokenizer paths.runs=$(RUNS)
	$(BIN)/python train.py experiment=digits_raster paths.runs=$(RUNS)
	$(BIN)/python sample.py checkpoint=$(RUNS)/digits_raster/release out=$(RUNS)/digits_samples num_samples=500 sampling=digits
	$(BIN)/python evaluate.py samples=$(RUNS)/digits_samples/samples.npz data=digits out=$(RUNS)/digits_samples/report.json
	@echo "pictures:    $(RUNS)/digits_tokenizer/pictures (reconstructions), $(RUNS)/digits_samples/grid.png (samples)"
	@echo "report:      $(RUNS)/digits_samples/report.json"
	@echo "checkpoints: $(RUNS)/digits_tokenizer/release, $(RUNS)/digits_raster/release"

video-quickstart: $(VENV)/.installed ## moving digits from pixels to a GIF of generated clips, on 2 CPU cores
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[video]'
	$(BIN)/python train.py experiment=moving_digits_tokenizer paths.runs=$(RUNS)
	$(BIN)/python train.py experiment=moving_digits_raster paths.runs=$(RUNS)
	$(BIN)/python sample.py checkpoint=$(RUNS)/moving_digits_raster/release out=$(RUNS)/moving_digits_samples num_samples=50 \
		sampling=moving_digits format=[npz,mp4,gif] animate=3
	@echo "watch: $(RUNS)/moving_digits_samples/grid.gif, grid.mp4; contact sheet grid.png; decoding decode.gif"

test: $(VENV)/.installed-dev ## ruff, mypy and the whole test suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

lint: $(VENV)/.installed-dev ## ruff and mypy only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches, not runs
	rm -rf .pytest_cache .mypy_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
