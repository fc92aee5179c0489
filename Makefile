# What one does often. Everything runs in .venv, which `make setup` makes; every target can be repeated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

# make board MEM=1024 CPU=cortex-a72 PROFILE=raspberry-pi-3b-plus CONSTRAINTS=constraints/board.txt
MEM ?= 512
CPU ?= cortex-a53
CORES ?= 4
PROFILE ?= raspberry-pi-zero-2w
CONSTRAINTS ?= constraints/board.txt

.PHONY: help setup demo test test-fast test-pythons lint format bench board wheels clean

help:
	@echo "make setup   install edgetune and everything its tests need into .venv"
	@echo "make demo    the main job: fine-tune the bundled model on the bundled digits for a Jetson Nano"
	@echo "make test    all tests; make test-fast leaves out the slow ones; make lint checks style and types"
	@echo "make board   edgetune on an emulated 512 MB board, judged from outside; make wheels: docs/boards.md's wheels install"
	@echo "make bench   the tables under benchmarks/ (takes long; nothing else should run beside it)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "edgetune needs Python 3.10 or newer: make setup PYTHON=python3.x"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[export,dev]'
	touch $(STAMP)

demo: setup
	rm -rf runs/demo runs/demo-capped
	$(BIN)/edgetune finetune --device jetson-nano --output runs/demo
	@echo
	@echo "The same under a cap that binds: 376 MiB, of which a Jetson Nano's runtime takes 316."
	$(BIN)/edgetune finetune --device jetson-nano --ram-cap 376MiB --steps 40 --output runs/demo-capped

test: setup lint test-pythons
	$(BIN)/python -m pytest -q -m "not alone" $(PARALLEL)
	$(BIN)/python -m pytest -q -m alone

test-fast: setup
	$(BIN)/python -m pytest -q -m "not slow" $(PARALLEL)

# The core needs no torch: its tests run on the oldest and the newest Python that is found and runs.
test-pythons: setup
	$(BIN)/python tools/test_pythons.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/allocators.py
	$(BIN)/python benchmarks/memory_model.py
	$(BIN)/python benchmarks/levers.py
	$(BIN)/python benchmarks/cap.py
	$(BIN)/python benchmarks/prefix_cache.py
	$(BIN)/python benchmarks/ort_vs_torch.py
	$(BIN)/python benchmarks/defaults.py

# An emulated arm64 board (QEMU): minutes; it says so and does nothing where QEMU is missing.
board: setup
	$(BIN)/python tools/board/make_board.py --mem $(MEM) --cpu $(CPU) --cores $(CORES) --profile $(PROFILE) --constraints $(CONSTRAINTS) $(BOARD_FLAGS)

# Whether what docs/boards.md says installs still does; needs a package index.
wheels: setup
	$(BIN)/python tools/check_wheels.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
