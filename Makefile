# make train    set up .venv from nothing, then train (on a synthetic demo where no data set is on disk)
# make test     set up .venv from nothing, then run every test
PYTHON := .venv/bin/python
ARGS ?=

.PHONY: setup train test test-slow lint bench soak lock audit

# Where requirements.lock holds, pip takes no file but those whose hashes it lists.
PINNED := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),\
    --require-hashes -r requirements.lock,\
    -r requirements.txt -r requirements-dev.txt -c constraints.txt)

setup: .venv/.current

.venv/.current: requirements.txt requirements-dev.txt requirements-parity.txt requirements-onnx.txt constraints.txt \
    requirements.lock
	$(call environment,.venv,$(PINNED))
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps \
	    -r requirements-parity.txt -r requirements-onnx.txt || { rm $@; exit 1; }

# environment DIR,REQUIREMENTS: a virtual environment of Python 3.11, by its own venv or by uv.
define environment
	@echo "Setting up $(1): a minute or two"
	@rm -rf $(1)
	@if command -v python3.11 >/dev/null && python3.11 -c 'import ensurepip' 2>/dev/null; then \
	    python3.11 -m venv $(1); \
	elif command -v uv >/dev/null; then \
	    uv venv --quiet --seed --python 3.11 $(1); \
	else \
	    echo "setup: Python 3.11 was not found; install python3.11 (with venv) or uv (https://docs.astral.sh/uv)" >&2; \
	    exit 2; \
	fi
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2)
	@touch $@
endef

train: setup
	$(PYTHON) train.py $(ARGS)

# Two files at a time: a file's tests share what is costly to make.
PYTEST := $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST) $(ARGS)

test-slow: setup
	$(PYTEST) -m "slow or not slow" $(ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# What is known against the versions that are pinned (docs/security.md); asks the package index.
audit: .venv-audit/.current
	.venv-audit/bin/pip-audit --strict --disable-pip --require-hashes -r requirements.lock $(ARGS)

# After a version has changed: every file's hash from the package index.
lock: .venv-audit/.current
	.venv-audit/bin/uv pip compile --quiet --no-config --default-index https://pypi.org/simple --python-version 3.11 \
	    --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --no-annotate \
	    requirements.txt requirements-dev.txt -c constraints.txt -o requirements.lock

.venv-audit/.current: requirements-audit.txt
	$(call environment,.venv-audit,-r requirements-audit.txt)

bench: setup .venv-peers/.current
	@for script in $(filter-out benchmarks/soak.py benchmarks/common.py,$(wildcard benchmarks/*.py)); do \
	    echo "== $$script"; $(PYTHON) $$script --peer-python .venv-peers/bin/python || failed=1; \
	done; exit $${failed:-0}

# The page under good and hostile load for 15 minutes; needs a trained checkpoint.
soak: setup
	$(PYTHON) benchmarks/soak.py $(ARGS)

# The libraries that the benchmarks compare with; the product needs none of them.
.venv-peers/.current: benchmarks/requirements.txt
	$(call environment,.venv-peers,-r benchmarks/requirements.txt)
