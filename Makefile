# make train    set up .venv from nothing, then train (on a synthetic demo where no data set is on disk)
# make test     set up .venv from nothing, then run every test
PYTHON := .venv/bin/python
ARGS ?=

.PHONY: setup train test test-slow lint bench

setup: .venv/.current

.venv/.current: requirements.txt requirements-dev.txt constraints.txt
	@if command -v python3.11 >/dev/null && python3.11 -c 'import ensurepip' 2>/dev/null; then \
	    python3.11 -m venv --clear .venv && \
	    $(PYTHON) -m pip install --quiet --disable-pip-version-check \
	        -r requirements.txt -r requirements-dev.txt -c constraints.txt; \
	elif command -v uv >/dev/null; then \
	    uv venv --quiet --clear --python 3.11 .venv && \
	    uv pip install --quiet --python $(PYTHON) -r requirements.txt -r requirements-dev.txt -c constraints.txt; \
	else \
	    echo "setup: Python 3.11 was not found; install python3.11 (with venv) or uv (https://docs.astral.sh/uv)" >&2; \
	    exit 2; \
	fi
	@touch $@

train: setup
	$(PYTHON) train.py $(ARGS)

test: setup
	$(PYTHON) -m pytest $(ARGS)

test-slow: setup
	$(PYTHON) -m pytest -m "slow or not slow" $(ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench: setup .venv-peers/.current
	@for script in benchmarks/*.py; do \
	    echo "== $$script"; $(PYTHON) $$script --peer-python .venv-peers/bin/python || failed=1; \
	done; exit $${failed:-0}

# The libraries that the benchmarks compare with; the product needs none of them.
.venv-peers/.current: benchmarks/requirements.txt
	python3.11 -m venv --clear .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	@touch $@
