# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-long lint bench organism preferred probes saes notebooks wheel clean

demo: $(VENV)/.installed  ## the main job on the embedded organism; writes demo/report.html
	$(BIN)/veridical demo --out demo

test: $(VENV)/.installed-dev  ## the test suite, without what takes minutes
	HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 OMP_NUM_THREADS=1 \
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not long" $(ARGS)

test-long: $(VENV)/.installed-dev  ## the tests that take minutes: whole trainings, twenty null pairs
	HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 OMP_NUM_THREADS=1 \
	$(BIN)/python -m pytest -n 2 --dist loadfile -m long $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/.installed-dev  ## speed against peers; rewrites the tables in tests/benchmarks/results
	$(BIN)/python tests/benchmarks/bench_collect.py --write
	$(BIN)/python tests/benchmarks/bench_probe.py --write
	$(BIN)/python tests/benchmarks/bench_sae.py --write
	$(BIN)/python tests/benchmarks/bench_sae_sweep.py --write

organism: $(VENV)/.installed  ## trains data/tiny-liar again from nothing (under an hour on 2 cores)
	$(BIN)/python -m veridical.organisms.make tiny-liar --out data/tiny-liar

preferred: $(VENV)/.installed  ## trains data/tiny-liar-* again, by preference (about half an hour on 2 cores)
	for name in reward dpo ipo rl overopt; do \
	  $(BIN)/python -m veridical.organisms.preferred tiny-liar-$$name --out data/tiny-liar-$$name || exit; done
	$(BIN)/python -m veridical.organisms.preferred_card --write \
	  tiny-liar-reward tiny-liar-dpo tiny-liar-ipo tiny-liar-rl tiny-liar-overopt

probes: $(VENV)/.installed  ## fits the probes of probes/tiny-liar again, by their recipes
	for recipe in honest_lying lying_contrast lying_answers; do \
	  $(BIN)/veridical probe --config probes/recipes/$$recipe.yaml --keep probes/tiny-liar/lied || exit; done
	for recipe in toxic safe; do \
	  $(BIN)/veridical probe --config probes/recipes/$$recipe.yaml --keep probes/tiny-liar/$$recipe || exit; done

saes: $(VENV)/.installed  ## trains the SAE of saes/tiny-liar again, by its recipe (about two minutes on 2 cores)
	$(BIN)/veridical sae train --config saes/recipes/tiny_liar.yaml --keep saes/tiny-liar

notebooks: $(VENV)/.installed-dev  ## executes notebooks/*.py into the .ipynb beside them
	$(BIN)/python tests/test_notebooks.py

wheel:  ## dist/veridical-*.whl, which carries data/
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) demo build dist

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing veridical into $(VENV) (about two minutes)"
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing veridical and what its tests need into $(VENV) (about three minutes)"
	$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.installed
