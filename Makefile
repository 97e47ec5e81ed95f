# Set-up and the daily commands. All of them make .venv first, from the pinned, hashed requirements.lock.
PYTHON ?= python3
BIN := .venv/bin
PATHS := cifar jobs tests

.PHONY: train serve cluster test check fast lock clean

train: .venv/installed
	$(BIN)/python jobs/train.py --data auto $(ARGS)

serve: .venv/installed
	$(BIN)/python jobs/serve.py $(ARGS)

cluster: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" sh cluster/local.sh

test: check
	$(BIN)/pytest $(ARGS)

fast: .venv/installed
	$(BIN)/pytest -m "not slow and not ray" $(ARGS)

check: .venv/installed
	$(BIN)/ruff check $(PATHS)
	$(BIN)/ruff format --check $(PATHS)
	$(BIN)/pyright

# uv comes first, alone and by its own pinned hash. Without --compile-bytecode every process of Ray would compile torch
# anew where PYTHONDONTWRITEBYTECODE is set, which doubles the start-up.
.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cifar needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	awk '/^[^ ]/ {uv = /^uv==/} uv' requirements.lock > .venv/uv.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt
	VIRTUAL_ENV=.venv $(BIN)/uv pip sync --quiet --require-hashes --compile-bytecode requirements.lock
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# Newest versions that pyproject.toml admits, with hashes and without the name of any index.
lock: .venv/installed
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-annotate --no-header --extra export --extra timm --group dev pyproject.toml -o requirements.lock

clean:
	rm -rf .venv .pytest_cache .ruff_cache
