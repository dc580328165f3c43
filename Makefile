PYTHON ?= python3
STACK ?= openmmlab
MODEL ?= faster
MINUTES ?= 10
TORCH ?= torch==2.13.0

ifeq ($(STACK),onedl)
VENV ?= .venv-onedl
REQUIREMENTS := requirements/onedl.txt
MIM := onedl-mim==0.5.1
EXTRAS := quickstart,tests,deploy
else
VENV ?= .venv
REQUIREMENTS := requirements/mminstall.txt
MIM := openmim
EXTRAS := quickstart,tests,deploy,imagenet
endif
MMCV := $(shell grep mmcv $(REQUIREMENTS))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --no-compile --disable-pip-version-check --no-warn-conflicts  # checked once
# On all cores, where pip takes one; a package's files for another Python do not compile.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
CONFIG := $(MODEL)-rcnn_od-r18-k4_fpn_digits.py
PRETRAINED := faster-rcnn_od-r18-k1-pretrained_fpn_digits.py
POSE ?= dy-r18-k4
POSE_CONFIG := configs/quickstart/td-hm_$(POSE)_digits.py
POSE_WORK := work_dirs/keypoints-$(POSE)
WORK := work_dirs/quickstart$(if $(filter-out faster,$(MODEL)),-$(MODEL))

.PHONY: help env keypoints-env quickstart keypoints pretrain test test-fast test-slow soak lint docs clean
help:  ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

env: $(VENV)/ready  ## the environment alone, 2.7 GB [TORCH=torch==2.13.0] [STACK=onedl] [PYTHON=python3]

$(VENV)/ready: setup.py pyproject.toml $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is older than Python 3.10: give another, make PYTHON=..."; exit 1; }
ifneq ($(STACK),onedl)
	@$(PYTHON) -c 'import sys; from importlib.util import find_spec; \
	  sys.exit(sys.version_info >= (3, 13) and not find_spec("mmcv"))' || \
	  { echo 'error: $(MMCV) does not build on Python 3.13: give an earlier one, make PYTHON=...,'; \
	  echo '       or take the maintained continuation, make STACK=onedl.'; exit 1; }
endif
	@$(PYTHON) -c 'import torch' 2>/dev/null && share=--system-site-packages; \
	  $(PYTHON) -m venv $$share $(VENV)
	$(PIP) 'setuptools<81' wheel ninja
	@$(BIN)/python -c 'import torch' 2>/dev/null || { \
	  echo 'Installing $(TORCH)'; $(PIP) '$(TORCH)' 'setuptools<81'; }  # torch alone would raise it
	@$(BIN)/python -c 'import mmcv.ops; from packaging.requirements import Requirement; \
	  assert mmcv.__version__ in Requirement("$(MMCV)").specifier' 2>/dev/null || { \
	  echo "Installing $(MMCV) with its ops. The first time on a machine this compiles them,"; \
	  echo "10 to 40 minutes on 2 cores; pip keeps the result, and the next time takes seconds."; \
	  MMCV_WITH_OPS=1 $(PIP) --no-build-isolation '$(MMCV)' || \
	  { echo 'error: mmcv was not built: see docs/troubleshooting.md'; exit 1; }; }
	@echo 'Installing mmengine, mmdet and what tests and tools need, about two minutes'
	$(PIP) -r $(REQUIREMENTS) 'setuptools<81'  # mim imports its pkg_resources
	$(PIP) -e '.[$(EXTRAS)]'
	$(PIP) --no-deps $(MIM)  # its dependencies would replace setuptools, rich and more
	$(PIP) click colorama model-index pandas requests rich tabulate
# opencv-python, which mmcv asks for, needs libGL and X11 of the system; headless does without.
	@$(BIN)/python -c 'import cv2' 2>/dev/null || { $(BIN)/python -m pip uninstall -qy opencv-python; \
	  $(PIP) --force-reinstall --no-deps opencv-python-headless; }
	@$(COMPILE)
	$(BIN)/python -c 'import mmdet_odconv'
# Left out on purpose: what mim would fetch data sets with pins old releases of setuptools and rich.
	@$(BIN)/python -m pip --disable-pip-version-check check | \
	  grep -vE '^No broken|mim .* (requires opendatalab|has requirement pandas)|requires opencv-python,' || true
	@touch $@; echo 'The environment is ready.'

keypoints-env: env  ## MMPose in it as well, for configs/keypoints
	$(PIP) cython json_tricks munkres
# mmpose alone: its dependency chumpy no longer builds, and no config here needs it.
	$(PIP) --no-deps --no-build-isolation --no-binary xtcocotools xtcocotools mmpose==1.3.2
	@$(COMPILE)

quickstart: env  ## data, training, COCO evaluation, pictures [MODEL=mask]
	@test -f configs/quickstart/$(CONFIG) || \
	  { echo "error: MODEL=$(MODEL) is not known: use faster or mask."; exit 1; }
	@echo '1 of 4: 1200 images, in data/digits'
	@$(BIN)/python tools/dataset_converters/digits.py data/digits
	@echo '2 of 4: training, in $(WORK): 3 epochs of 250 iterations, 8 to 17 minutes on 2 cores. First'
	@echo '        the environment and the config are logged, then a line every 10 iterations.'
	$(BIN)/mim train mmdet_odconv $(CONFIG) --work-dir $(WORK) --resume
	@echo '3 of 4: COCO evaluation of the last checkpoint'
	$(BIN)/mim test mmdet_odconv $(CONFIG) --checkpoint "$$(cat $(WORK)/last_checkpoint)" \
	  --work-dir $(WORK) --out $(WORK)/predictions.pkl
	@echo '4 of 4: pictures'
	@$(BIN)/python tools/analysis_tools/report.py $(WORK)

keypoints: keypoints-env  ## corners of digits by MMPose: training, AP, a picture [POSE=r18]
	$(BIN)/python tools/dataset_converters/digits.py data/digits-keypoints --keypoints
	$(BIN)/mim train mmpose $(POSE_CONFIG) --work-dir $(POSE_WORK) --resume
	$(BIN)/mim test mmpose $(POSE_CONFIG) --checkpoint "$$(cat $(POSE_WORK)/last_checkpoint)" \
	  --work-dir $(POSE_WORK) --dump $(POSE_WORK)/predictions.pkl
	$(BIN)/python tools/analysis_tools/report.py $(POSE_WORK)

pretrain: env  ## a classifier, then a detector from its checkpoint
	$(BIN)/python tools/dataset_converters/digits.py data/digits-classification \
	  --classification --train 1433 --val 364 --size 32  # each of scikit-learn's digits once
	$(BIN)/python tools/dataset_converters/digits.py data/digits
	$(BIN)/mim train mmpretrain configs/quickstart/od-r18-k1_digits.py \
	  --work-dir work_dirs/pretrain --resume
	$(BIN)/mim train mmdet_odconv $(PRETRAINED) --work-dir work_dirs/quickstart-pretrained --resume

test: env  ## the suite, 12 to 20 minutes on 2 cores [STACK=onedl]
	$(BIN)/python -m pytest -n 2 tests

FAST := tests/ops/test_dynamic_conv.py tests/ops/test_convolution.py tests/ops/test_cells.py \
  tests/ops/test_pooling.py tests/layers/test_odconv.py tests/engine/test_launch.py \
  tests/test_command.py tests/test_documents.py

test-fast: env  ## ops, a layer, the command line and the documents, under two minutes
	$(BIN)/python -m pytest -q -n 2 $(FAST)

test-slow: env  ## what takes minutes a test: the tutorial, comparisons, pretraining
	$(BIN)/python -m pytest -n 2 -m slow tests

soak: env  ## training runs killed and resumed, their bits compared [MINUTES=10]
	$(BIN)/python tests/soak.py --minutes $(MINUTES)

lint: env  ## ruff, and mypy on the types
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: env  ## the documentation, into build/docs; warnings are errors
	$(PIP) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q
	@echo 'Read it, and search it, offline: python3 -m http.server -d build/docs'

clean:  ## what tests and builds leave
	rm -rf build dist work_dirs/test .pytest_cache .mypy_cache .ruff_cache .hypothesis
