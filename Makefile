# make demo   from raw video files to a trained, sampled, measured model and its page (runs/demo/report.html)
# make test   the tests
# Both set up .venv first; what stands already is not done twice, what was interrupted is done again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Ranks of the demo's training: its GPUs, a power of two and at most 4; two on a CPU.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
RANKS ?= $(shell if [ $(GPUS) -ge 4 ]; then echo 4; elif [ $(GPUS) -eq 1 ]; then echo 1; else echo 2; fi)
MICRO := $(shell echo $$((12 / $(RANKS))))
TRAIN := $(BIN)/deepspeed --num_accelerators $(RANKS) --module rf_train.train
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test setup clean

demo: setup
	$(BIN)/python -m data_prep.draw data/demo/videos/train --videos 768 --frames 57 --size 48x48 --shapes 2-2 --seed 0
	$(BIN)/python -m data_prep.draw data/demo/videos/long --videos 32 --frames 237 --size 48x48 --shapes 2-2 --seed 1
	$(BIN)/python -m data_prep.encode data/demo/videos/train data/demo/train --fps 16 --size 48x48 --frames 57 --codec default --text default --samples-per-shard 256
	$(BIN)/python -m data_prep.encode data/demo/videos/long data/demo/long --fps 16 --size 48x48 --frames 237 --codec default:data/demo/train --text default --samples-per-shard 128
	$(TRAIN) demo optimizer.micro_batch=$(MICRO)
	$(TRAIN) demo_teacher_forcing optimizer.micro_batch=$(MICRO)
	$(BIN)/python -m rf_train.evaluate runs/demo --clips 32 --batch 16
	$(BIN)/python -m rf_train.evaluate runs/demo_teacher_forcing --clips 32 --batch 16
	@test -e runs/demo/videos/prompt.mp4 || $(BIN)/python -m rf_train.generate runs/demo runs/demo/videos/prompt.mp4 --seconds 10 --prompt "a red circle moving right in front of a blue square moving down"
	@test -e runs/demo/videos/continued.mp4 || $(BIN)/python -m rf_train.generate runs/demo runs/demo/videos/continued.mp4 --seconds 10 --video data/demo/videos/long/video-00000.mp4
	$(BIN)/python -m rf_train.report runs/demo runs/demo_teacher_forcing

test: setup
	$(BIN)/python -m pytest

setup: $(READY)

# The mark is written last. Without it a folder that stands is the rest of an interrupted set-up, and is made anew.
$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than Python 3.10; set PYTHON=python3.x" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "error: $(PYTHON) can't make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $(READY)

clean:
	rm -rf $(VENV) data/demo runs/demo runs/demo_teacher_forcing
