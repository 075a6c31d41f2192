# make demo                    from raw video files to a trained, sampled, measured model: runs/demo/report.html
# make evidence                hours: every claim with several seeds: runs/evidence/results.md (rf_train/evidence)
# make evidence E=--quick      the same in minutes, only to see that it runs; E="histories --seeds 1" a part of it
# make evidence VIDEO=CLIP.mp4 with the histories on real pixels, too: a file or a folder of your own; FPS=15 is its rate
# make real-data VIDEO=...     only the data of that; then: .venv/bin/python -m rf_train.evidence real
# make test                    all tests;  make test T=tests/model  some of them
# make test-fast               all but the slow tests: for everyday work
# make test-slurm              the batch scripts on a real Slurm; installs it (Debian)
# make lint, make format       what CI checks besides the tests; format the code
# make demo TORCH=cpu          with PyTorch's build for CPUs (or TORCH=cu128, ...); later calls keep it
# All set up .venv first. Finished work is not repeated. Interrupted work is resumed or done again.

PYTHON ?= python3
TORCH ?=
T ?= tests
VENV := .venv
BIN := $(VENV)/bin
# The file that marks a finished set-up. Without TORCH any existing one will do, whatever its PyTorch build is.
READY := $(if $(TORCH),$(VENV)/.ready-$(TORCH),$(firstword $(wildcard $(VENV)/.ready*) $(VENV)/.ready))
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH_INDEX := $(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH))

# Ranks of the demo's training: 1 with a single GPU, else 2.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
RANKS ?= $(if $(filter 1,$(GPUS)),1,2)
MICRO := $(shell echo $$((6 / $(RANKS))))
TRAIN := $(BIN)/deepspeed --num_accelerators $(RANKS) --module rf_train.train
DRAW := $(BIN)/python -m data_prep.draw
ENCODE := $(BIN)/python -m data_prep.encode
GENERATE := $(BIN)/python -m rf_train.generate
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Who has chosen PyTorch's build for CPUs trains on the CPU, also where there are GPUs.
ifneq ($(filter %.ready-cpu,$(READY)),)
export DS_ACCELERATOR := cpu
endif

DATA := data/demo
RUN := runs/demo
WORLD := --size 32x32 --shapes 1 --kinds square,cross --colours red,green,blue
CLIPS := --fps 16 --size 32x32 --text default
PROMPT := a red cross moving right

E ?=
VIDEO ?=
FPS ?= 16
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: demo demo-data real-data evidence test test-fast test-slurm lint format setup clean

demo: demo-data
	$(TRAIN) demo optimizer.micro_batch=$(MICRO) evaluation.every=800
	$(TRAIN) demo_teacher_forcing optimizer.micro_batch=$(MICRO) evaluation.every=800
	$(BIN)/python -m rf_train.evaluate $(RUN) --clips 32 --batch 16
	$(BIN)/python -m rf_train.evaluate $(RUN)_teacher_forcing --clips 32 --batch 16
	@test -e $(RUN)/videos/prompt.mp4 || $(GENERATE) $(RUN) $(RUN)/videos/prompt.mp4 --seconds 10 --prompt "$(PROMPT)"
	@test -e $(RUN)/videos/continued.mp4 || \
		$(GENERATE) $(RUN) $(RUN)/videos/continued.mp4 --seconds 10 --video $(DATA)/videos/long/video-00000.mp4 \
			--prompt "$$(cat $(DATA)/videos/long/video-00000.txt)"
	$(BIN)/python -m rf_train.report $(RUN) $(RUN)_teacher_forcing

demo-data: setup
	$(DRAW) $(DATA)/videos/train --videos 1024 --frames 57 $(WORLD) --seed 0
	$(DRAW) $(DATA)/videos/long --videos 32 --frames 237 $(WORLD) --seed 1
	$(ENCODE) $(DATA)/videos/train $(DATA)/train $(CLIPS) --frames 57 --codec default
	$(ENCODE) $(DATA)/videos/long $(DATA)/long $(CLIPS) --frames 237 --codec default:$(DATA)/train

# Small windows out of a real video. Clips of four times the trained length, of other seconds, to evaluate on.
REAL := data/real
REAL_CLIPS := --fps $(FPS) --size 32x32 --text default
real-data: setup
	@test -n '$(VIDEO)' || { echo "error: name a real video: make real-data VIDEO=FILE_OR_FOLDER" >&2; exit 2; }
	$(BIN)/python -m data_prep.windows '$(VIDEO)' $(REAL)/videos --fps $(FPS)
	$(ENCODE) $(REAL)/videos/train $(REAL)/train $(REAL_CLIPS) --frames 41 --codec default
	$(ENCODE) $(REAL)/videos/held_out $(REAL)/long $(REAL_CLIPS) --frames 173 --codec default:$(REAL)/train

# Ten times the trained length to evaluate on, and clips of twice the length to train on.
evidence: demo-data $(if $(VIDEO),real-data)
	$(DRAW) $(DATA)/videos/ten --videos 16 --frames 597 $(WORLD) --seed 2
	$(DRAW) $(DATA)/videos/train_long --videos 512 --frames 117 $(WORLD) --seed 3
	$(ENCODE) $(DATA)/videos/ten $(DATA)/ten $(CLIPS) --frames 597 --codec default:$(DATA)/train
	$(ENCODE) $(DATA)/videos/train_long $(DATA)/train_long $(CLIPS) --frames 117 --codec default:$(DATA)/train
	$(BIN)/python -m rf_train.evidence $(E)

test: setup
	$(BIN)/python -m pytest $(T)

test-fast: setup
	$(BIN)/python -m pytest -m "not slow" $(T)

SLURM := slurm-wlm munge shellcheck
test-slurm: setup
	@dpkg -s $(SLURM) >/dev/null 2>&1 || { $(SUDO) apt-get update && $(SUDO) apt-get install --yes $(SLURM); }
	$(BIN)/python -m pytest tests/slurm

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(READY)

# The mark is written last. A .venv without it comes from an interrupted set-up, and is built again.
$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than Python 3.10; set PYTHON=python3.x" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "error: $(PYTHON) can't make virtual environments; on Debian: apt install python3-venv" >&2; exit 2; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_INDEX) torch setuptools
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) data/demo runs/demo runs/demo_teacher_forcing
