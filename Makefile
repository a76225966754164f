# A fresh machine needs Python 3.11 or newer and make; everything else goes into .venv.
#
#   make demo        the whole recipe on the village, then read runs/village/report.html
#   make test        the tests
#   make lint        ruff
#   make matrix      every stage on every mesh of eight devices, and in several processes
#   make reference   the tests against PyTorch, TRL and rlax (installs them)
#   make weights     SmolLM2-135M-Instruct, for configs/hh.py:smollm2
#   make conformance writes docs/conformance.md from the tests' markers

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WEIGHTS ?= $(or $(RLHF_JAX_WEIGHTS),$(HOME)/.cache/rlhf_jax/weights)

.PHONY: demo test matrix lint reference weights conformance clean

demo: $(VENV)/core
	$(BIN)/python experiments/chatgpt.py --config=configs/village.py --workdir=runs/village

test: $(VENV)/test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(PYTEST)

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

matrix: $(VENV)/test
	$(BIN)/python -m pytest -m matrix $(PYTEST)

reference: $(VENV)/reference
	JAX_DISABLE_MOST_OPTIMIZATIONS=false $(BIN)/python -m pytest -m reference $(PYTEST)

weights: $(VENV)/core
	$(BIN)/python experiments/fetch_weights.py $(WEIGHTS)

conformance: $(VENV)/test
	$(BIN)/python tests/conformance.py docs/conformance.md

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache

# Each of these empty files says what .venv holds; one older than setup.py is made again.
$(VENV)/core: setup.py
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("rlhf_jax needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/test: $(VENV)/core
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/reference: $(VENV)/test
	$(BIN)/python -m pip install --quiet --editable '.[test,reference]'
	touch $@
