# make demo: install and run the demo.  make test: install and run the tests.  make check: all that CI checks.
# make bench: measure a cell or two of each row of docs/performance.md, beside Flower and PEFT (40 minutes, 2 cores).
# make model: verify the mesh's protocol (needs spin and gcc).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STAMP_TEST := $(VENV)/.installed-test
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
PEERS := .venv-peers
PEERS_PIP := $(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet

.PHONY: install demo test bench faults soak fuzz mutate check lint format model proto clean docs package

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone: with its release in place nothing else pulls another build of it.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) -e ".[all]"
	@touch $@

$(STAMP_TEST): $(STAMP)
	$(PIP) -e ".[test]"
	@touch $@

demo: $(STAMP)
	$(BIN)/decaf compare digits

# Three processes for two cores: many tests of agents and ranks wait for time to pass.
test: $(STAMP_TEST)
	$(BIN)/python -m pytest -n 3 --dist loadfile -q

# Flower and Ray want other releases of what they share with us, so the peers have an environment of their own.
$(PEERS)/.installed: benchmarks/suite/peers/requirements.txt constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS_PIP) -c constraints.txt torch
	$(PEERS_PIP) -c constraints.txt transformers peft
	$(PEERS_PIP) -r benchmarks/suite/peers/requirements.txt
	@touch $@

# What is in the results for this commit already is not measured again, so it goes on where it was stopped. BENCH=--full
# for the whole grid, BENCH=--again for new numbers.
bench: $(STAMP_TEST) $(PEERS)/.installed
	$(BIN)/python -m benchmarks.suite $(BENCH); failed=$$?; $(BIN)/python -m benchmarks.suite --page; exit $$failed

# Kills a run at every write, resumes it and compares bits; slow lines and hostile bytes between the agents of a mesh;
# real agents that are killed, stopped and cut off. `make test` has a sample of each. Twenty minutes, and an hour if
# there is no record of the last part. What is stopped goes on with its record.
faults: $(STAMP_TEST)
	OMP_NUM_THREADS=1 $(BIN)/python tests/robustness/faults.py
	$(BIN)/python benchmarks/mesh_links.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mesh_faults.py

# Five agents, 500 rounds, a random fault every ten; are memory and descriptors flat?
soak: $(STAMP_TEST)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mesh_soak.py

lint: $(STAMP_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in site/; a broken link or a page that nobody leads to is an error.
docs: $(STAMP_TEST)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

check: lint docs test

format: $(STAMP_TEST)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Spoilt inputs until it is stopped; tests/robustness/test_fuzz.py is a sample of them.
fuzz: $(STAMP_TEST)
	$(BIN)/python tests/helpers/fuzz.py

# Changes one operator or number at a time and runs the tests of that file: do they notice? Goes on with its record.
mutate: $(STAMP_TEST)
	$(PIP) cosmic-ray
	$(BIN)/python scripts/mutate.py

# Wheel and sdist in dist/, checked, and the demo run from the wheel alone.
package: $(STAMP_TEST)
	$(PIP) build twine
	scripts/package.sh $(BIN)/python

model:
	model/verify.sh

# The module that src/decaf_lora/engines/links/mesh.proto describes; a test checks that it is current.
proto: $(STAMP_TEST)
	$(BIN)/python -m grpc_tools.protoc -Isrc --python_out=src --pyi_out=src src/decaf_lora/engines/links/mesh.proto

clean:
	rm -rf $(VENV) $(PEERS) build model/build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
