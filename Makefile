# demo and test set everything up by themselves; check, bench and the rest use the same environment.
# make test PYTHON=python3.13 takes that interpreter, in environments whose names end in its own.
PYTHON ?= python3
SUFFIX := $(if $(filter-out python3,$(notdir $(PYTHON))),-$(notdir $(PYTHON)))
VENV := .venv$(SUFFIX)
BIN := $(VENV)/bin
INSTALL = $(@D)/bin/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed
PEERS := .venv-peers$(SUFFIX)
# make aot TRITON=3.6.0 compiles with that version, in an environment of its own.
AOT := $(if $(TRITON),.venv-triton-$(TRITON)$(SUFFIX),$(VENV))
# make test-transformers TRANSFORMERS=5.17.0 takes that version only, in an environment of its own.
TRANSFORMERS_5 := .venv-transformers-$(or $(TRANSFORMERS),5)$(SUFFIX)
# make test-lowest TORCH=2.11.0 takes that version, in an environment of its own.
LOWEST := .venv-lowest$(addprefix -torch-,$(TORCH))$(SUFFIX)

.PHONY: demo test aot check tiny peers test-peers transformers test-transformers test-lowest \
	bench report goldens clean test-gpu test-gpu-kernels test-gpu-full bench-gpu

# $(call environment,CONSTRAINTS,PACKAGES) makes the target's folder an environment with torch, this
# package and those. A CUDA build of torch requires one version of Triton, which then goes before
# the one of the constraints.
define environment
	$(PYTHON) -m venv $(@D)
	grep -v '^triton==' $(1) > $(@D)/constraints.txt
	$(INSTALL) --constraint $(@D)/constraints.txt torch
	$(@D)/bin/python -m pip show torch | grep -q triton || cp $(1) $(@D)/constraints.txt
	$(INSTALL) --constraint $(@D)/constraints.txt --editable $(2)
	touch $@
endef

TEST_TOOLS := hypothesis psutil pytest pytest-benchmark sacrebleu

demo: $(STAMP)
	$(BIN)/python -m recipes.tiny.demo

# pytest-benchmark has nothing to do there, and warns of processes that share a machine.
TWO_PROCESSES = -n 2 -p no:benchmark

test: $(STAMP)
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(TWO_PROCESSES) -m triton \
		tests/ops tests/moe tests/models tests/gpu tests/test_losses.py
	$(BIN)/python -m benchmarks.ahead_of_time --check --changed

# Compiles every kernel for GPUs that are not here and writes what came out; ARGS=--check compares.
aot: $(AOT)/.installed
	$(AOT)/bin/python -m benchmarks.ahead_of_time $(ARGS)

# Before 3.7, Triton's interpreter does not work with numpy 2.4.
.venv-triton-%$(SUFFIX)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -vE '^(numpy|triton)==' constraints.txt > $(@D)/constraints.txt
	$(INSTALL) --constraint $(@D)/constraints.txt torch
	$(INSTALL) --constraint $(@D)/constraints.txt --editable . 'triton==$*' 'numpy<2.4'
	touch $@

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# The small model of the package, from nothing: corpus, random weights, training, scores.
tiny: $(STAMP)
	$(BIN)/python -m recipes.tiny.train

$(STAMP): pyproject.toml constraints.txt
	$(call environment,constraints.txt,'.[dev]')

# transformers 4.57.1 needs another huggingface_hub than the tested set: an environment of its own.
peers: $(PEERS)/.installed
$(PEERS)/.installed: pyproject.toml constraints-peers.txt
	$(call environment,constraints-peers.txt,. transformers ctranslate2 peft $(TEST_TOOLS))

test-peers: $(PEERS)/.installed
	$(PEERS)/bin/python -m pytest -m peers tests/benchmarks/test_generation.py \
		tests/checkpoints tests/integrations \
		tests/pretrained tests/translator

# Both ends of the versions of transformers whose models can be patched.
transformers: $(if $(TRANSFORMERS),,$(PEERS)/.installed) $(TRANSFORMERS_5)/.installed
.venv-transformers-5$(SUFFIX)/.installed: pyproject.toml constraints-transformers-5.txt
	$(call environment,constraints-transformers-5.txt,. transformers peft $(TEST_TOOLS))

.venv-transformers-%$(SUFFIX)/.installed: pyproject.toml constraints-transformers-5.txt
	mkdir -p $(@D)
	grep -vE '^(transformers|tokenizers|huggingface_hub)==' constraints-transformers-5.txt \
		> $(@D)/pins.txt
	$(call environment,$(@D)/pins.txt,. transformers==$* peft $(TEST_TOOLS))

OF_TRANSFORMERS = tests/integrations tests/benchmarks/test_patched_layer.py
test-transformers: transformers
ifndef TRANSFORMERS
	$(PEERS)/bin/python -m pytest -m 'transformers or peers' $(OF_TRANSFORMERS)
endif
	$(TRANSFORMERS_5)/bin/python -m pytest -m transformers $(OF_TRANSFORMERS)

# The lowest versions that pyproject.toml admits, the rest as tested; of torch only where TORCH names
# it, since old versions may be had with CUDA alone.
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest
$(LOWEST)/.installed: pyproject.toml constraints.txt constraints-lowest.txt
	mkdir -p $(@D)
	cut -d= -f1 constraints-lowest.txt | sed 's/.*/^&==/' | grep -vf - constraints.txt \
		$(if $(TORCH),| sed 's/^torch==.*/torch==$(TORCH)/') \
		| cat - constraints-lowest.txt > $(@D)/pins.txt
	$(call environment,$(@D)/pins.txt,'.[dev]')

goldens: $(PEERS)/.installed
	$(PEERS)/bin/python tests/golden/make_tokenizer_goldens.py
	$(PEERS)/bin/python tests/golden/make_model_goldens.py
	$(PEERS)/bin/python tests/golden/make_pretrained_goldens.py
	$(PEERS)/bin/python tests/golden/make_pretrained_tokenizer_goldens.py
	$(PEERS)/bin/python tests/golden/make_generate_goldens.py

# Close other work first. Prints each figure beside the last committed one on the same device.
bench: $(PEERS)/.installed
	$(PEERS)/bin/python -m benchmarks $(ARGS)

report: $(STAMP)
	$(BIN)/python -m benchmarks.report

# On a machine with a GPU: these install nothing and run the python3 they find. Its packages are
# not ours, so that what they warn of is printed and fails nothing.
ON_GPU = CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTHONPATH=. $(PYTHON) -m pytest -W default
# Nearly all of the first part's time is compilation, which several processes share.
SHARED = $(shell $(PYTHON) -c 'import xdist' 2>/dev/null && echo -n 8)

# PART=kernels runs the tests of the kernels at small shapes, PART=full those at the 54B's.
test-gpu: $(addprefix test-gpu-,$(or $(PART),kernels full))

test-gpu-kernels:
	$(ON_GPU) -m triton tests/ops tests/moe tests/models tests/test_losses.py $(SHARED) $(ARGS)

test-gpu-full:
	$(ON_GPU) -m 'gpu or triton' tests/gpu tests/checkpoints $(ARGS)

bench-gpu:
	$(PYTHON) -m benchmarks --device cuda $(PART)

clean:
	rm -rf .venv .venv-* build .pytest_cache .ruff_cache
