# demo and test set everything up by themselves; check, bench and the rest use the same environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed
PEERS := .venv-peers
# make aot TRITON=3.6.0 compiles with that version, in an environment of its own.
AOT := $(if $(TRITON),.venv-triton-$(TRITON),$(VENV))

.PHONY: demo test aot check tiny peers test-peers bench report goldens clean \
	test-gpu test-gpu-kernels test-gpu-full bench-gpu

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
.venv-triton-%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -vE '^(numpy|triton)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(@D)/constraints.txt torch
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(@D)/constraints.txt --editable . 'triton==$*' 'numpy<2.4'
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
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	touch $@

# transformers 4.57.1 needs another huggingface_hub than the tested set: an environment of its own.
peers: $(PEERS)/.installed
$(PEERS)/.installed: pyproject.toml constraints-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-peers.txt torch
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-peers.txt \
		--editable . transformers ctranslate2 peft pytest pytest-benchmark hypothesis sacrebleu
	touch $@

test-peers: $(PEERS)/.installed
	$(PEERS)/bin/python -m pytest -m peers tests/benchmarks/test_generation.py \
		tests/checkpoints tests/integrations \
		tests/pretrained tests/translator

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
	rm -rf $(VENV) $(PEERS) .venv-triton-* build .pytest_cache .ruff_cache
