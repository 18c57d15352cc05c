# make serve   set up, then serve the demo bundle: make serve PORT=8100 BUNDLE=path/to/bundle
# make test    set up, then run all tests
# make check   set up, then formatting, lint and types, as CI does
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
PORT ?= 8000
BUNDLE ?= examples/support_desk/bundle

.PHONY: setup serve test check format lock clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

serve: setup
	$(BIN)/loraplex serve $(BUNDLE) --port $(PORT)

test: setup
	$(BIN)/pytest -n logical --dist loadfile

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Newest versions of everything in pyproject.toml, torch aside: its pin chooses the build.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet torch==2.13.0 setuptools
	build/lock/bin/pip install --quiet -e '.[dev]'
	build/lock/bin/pip freeze --all --exclude-editable --exclude pip \
		| sed 's/^torch[ =].*/torch==2.13.0/' > requirements.lock

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis
