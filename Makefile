# demo and test set everything up by themselves; check, bench and the rest use the same environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed
PEERS := .venv-peers

.PHONY: demo test check tiny peers test-peers bench report test-gpu bench-gpu goldens clean

demo: $(STAMP)
	$(BIN)/python -m recipes.tiny.demo

test: $(STAMP)
	$(BIN)/python -m pytest

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
		--editable . transformers pytest pytest-benchmark hypothesis sacrebleu
	touch $@

test-peers: $(PEERS)/.installed
	$(PEERS)/bin/python -m pytest -m peers tests/checkpoints tests/integrations

goldens: $(PEERS)/.installed
	$(PEERS)/bin/python tests/golden/make_tokenizer_goldens.py
	$(PEERS)/bin/python tests/golden/make_model_goldens.py

# Close other work first. Prints each figure beside the last committed one on the same device.
bench: $(PEERS)/.installed
	$(PEERS)/bin/python -m benchmarks $(ARGS)

report: $(STAMP)
	$(BIN)/python -m benchmarks.report

# On a machine with a GPU: these install nothing and run the python3 they find.
test-gpu:
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu tests/gpu tests/checkpoints

bench-gpu:
	$(PYTHON) -m benchmarks --device cuda $(PART)

clean:
	rm -rf $(VENV) $(PEERS) build .pytest_cache .ruff_cache
