# The set-up of this project, in full. `make demo` and `make test` are all a newcomer needs.
#
#   make demo       a real language model and real text to a browsable dictionary of its features
#   make test       every test but the slow ones
#   make test-all   the slow ones too
#   make check      format, lint, types, layering, docs
#   make bench      every benchmark; make bench-NAME for one (harvest, train, selection, evaluate, atlas,
#                   browse, toy, intervene, pretrain)
#   make bench-peers  the same rows through SAELens, sparsify and dictionary_learning: an environment for each
#   make exchange-check  dictionaries to and from SAELens, sparsify and dictionary_learning themselves
#   make wrappers-check  nnsight's and TransformerLens' activations against the model's own
#   make sae-bench-check  SAEBench's core evaluation on a dictionary of ours
#   make install    .venv with the `sememe` command

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip

# A process for each core, one core for each (tests/conftest.py).
WORKERS := --numprocesses logical --maxprocesses 8 --dist worksteal

.DELETE_ON_ERROR:
.PHONY: install demo demo-run test test-all check format bench bench-browse bench-peers exchange-check wrappers-check sae-bench-check clean

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sememe needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "python's venv module is missing; on Debian: apt-get install python3-venv"; exit 2; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV) ..."
	@$(PIP) install --quiet --no-compile --constraint constraints.txt --editable . 2>.venv/install.log \
	  || { cat .venv/install.log; exit 1; }
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing what the tests need ..."
	@$(PIP) install --quiet --no-compile --constraint constraints.txt --editable '.[test]' 2>.venv/install.log \
	  || { cat .venv/install.log; exit 1; }
	@touch $@

install: $(VENV)/.installed

# The clock starts before the set-up, so that what is printed at the end holds everything.
demo:
	@SEMEME_DEMO_STARTED=$$(date +%s) $(MAKE) --no-print-directory demo-run

demo-run: install
	@$(BIN)/python scripts/demo.py

check: $(VENV)/.installed-test
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/test_layering.py tests/test_docs.py

format: $(VENV)/.installed-test
	@$(BIN)/ruff check --fix-only --quiet . ; $(BIN)/ruff format .

test: $(VENV)/.installed-test
	@scripts/chromium.sh
	@$(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-all: $(VENV)/.installed-test
	@scripts/chromium.sh
	@$(BIN)/python -m pytest $(WORKERS)

bench-%: install
	@mkdir -p artifacts/bench
	@$(BIN)/python benchmarks/bench_$*.py

# It opens the page in a browser, which the tests need, too.
bench-browse: $(VENV)/.installed-test
	@scripts/chromium.sh
	@mkdir -p artifacts/bench
	@$(BIN)/python benchmarks/bench_browse.py

# Each package has an environment of its own, as their pins conflict. ARGS="--only sae_lens" runs a part.
PEERS := sae_lens sparsify dictionary_learning
PEER_sae_lens := sae-lens==6.54.12
PEER_sparsify := eai-sparsify==1.3.3
PEER_dictionary_learning := dictionary-learning==0.1.0
PEER_wrappers := transformer-lens nnsight
PEER_sae_bench := sae-bench==0.6.0

.venv-peers-%/.installed: constraints.txt
	@echo "Installing $(PEER_$*) into .venv-peers-$* ..."
	@$(PYTHON) -m venv .venv-peers-$*
	@PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-peers-$*/bin/python -m pip install --quiet --no-compile \
	  --constraint constraints.txt $(PEER_$*) 2>.venv-peers-$*/install.log || { cat .venv-peers-$*/install.log; exit 1; }
	@# A torchvision of another build than torch breaks transformers, which does without one.
	@.venv-peers-$*/bin/python -m pip uninstall --quiet --yes torchvision 2>/dev/null || true
	@touch $@

bench-peers: install $(PEERS:%=.venv-peers-%/.installed)
	@$(BIN)/python benchmarks/bench_peers.py $(ARGS)

# Every architecture in both directions, each package in its own environment.
exchange-check: install $(PEERS:%=.venv-peers-%/.installed)
	@$(BIN)/python scripts/exchange_check.py $(ARGS)

# These need Sememe's own packages too: the environment sees them behind its own (a second numpy, say, goes first).
.venv-peers-%/.beside: .venv-peers-%/.installed install
	@for site in .venv-peers-$*/lib/python3.*/site-packages; do \
	  ls -d "$(CURDIR)"/$(VENV)/lib/python3.*/site-packages > $$site/zz_sememe.pth; done
	@touch $@

.PRECIOUS: .venv-peers-%/.installed

wrappers-check: .venv-peers-wrappers/.beside
	@PYTHONPATH=. .venv-peers-wrappers/bin/python scripts/check_wrappers.py

sae-bench-check: .venv-peers-sae_bench/.beside
	@PYTHONPATH=. .venv-peers-sae_bench/bin/python scripts/check_sae_bench.py

bench: bench-harvest bench-train bench-selection bench-evaluate bench-atlas bench-browse bench-toy bench-intervene bench-pretrain

clean:
	rm -rf artifacts .venv-peers-* build dist *.egg-info
