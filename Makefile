# Needs GNU make, a POSIX shell and Python >= 3.11. Everything is installed into .venv; pip's own
# configuration (index, proxy, cache) is respected. Another Python: make PYTHON=python3.13 test

PYTHON ?= python3
PYTEST_ARGS ?=
BIN := .venv/bin
DEMO_FILES := demo/data.txt demo/ckpt.pt demo/ckpt.run demo/model.onnx

.PHONY: help demo test test-slow check bench bench-peers clean

help:
	@echo 'make demo       train, export and run a small model in demo/: under 4 minutes after the downloads'
	@echo 'make test       all tests but the slow ones (PYTEST_ARGS="-k tokenizer" for some)'
	@echo 'make test-slow  the tests that take minutes each'
	@echo 'make check      ruff, format, mypy --strict and the import contracts on the installed wheel'
	@echo 'make bench      has anything become slower? Under three minutes'
	@echo 'make bench-peers  the same weights on every rival engine: installs these, then under 40 minutes'
	@echo 'make clean      remove build outputs, caches and the files of the demo; .venv stays'

# Each stamp is touched last, so that an interrupted install is done again.
.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'pico-edge needs Python 3.11 or newer and $(PYTHON) is' "`$(PYTHON) --version 2>&1`:" \
	    'name another one, as in: make PYTHON=python3.13 demo' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade -c constraints.txt pip  # --group needs pip 25.1
	@touch $@

.venv/.all: .venv/.made pyproject.toml constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e '.[all]'
	@touch $@

.venv/.dev: .venv/.all
	$(BIN)/python -m pip install -c constraints.txt --group dev
	@touch $@

# The text is the language reference that pydoc shows: English, and part of every CPython.
demo: .venv/.all
	@rm -rf $(DEMO_FILES)
	@mkdir -p demo
	@$(BIN)/python -c 'import pathlib, pydoc_data.topics as t; \
	  pathlib.Path("demo/data.txt").write_text("\n\n".join(t.topics.values()), encoding="utf-8")'
	@echo; echo 'demo/data.txt: the text of pydoc_data.topics. Put your own text in its place and repeat, in demo/:'
	@PATH="$$PWD/$(BIN):$$PATH"; export PATH; set -e; cd demo; \
	for command in 'pico-edge train data.txt --minutes 2' \
	  'pico-edge export ckpt.pt --quantize' 'pico-edge generate model.onnx "Hello"'; \
	do echo; echo "\$$ $$command"; eval "$$command"; done

# Two processes: 4.5 minutes on two cores instead of 8. A failure is easier to follow with PYTEST_ARGS=-n0.
test: .venv/.dev
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist worksteal $(PYTEST_ARGS)

test-slow: .venv/.dev
	$(BIN)/python -m pytest -m slow --timeout 3600 $(PYTEST_ARGS)

# mypy and import-linter cannot follow an editable install, so they read the wheel: from a second venv,
# outside the repository. That venv sees the packages of .venv through a path file, in which the editable
# install is not active (site.py runs no path files of a folder that a path file names).
check: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	@repo=$$PWD; outside=`mktemp -d`; trap 'rm -rf "$$outside"' EXIT; set -ex; \
	$(BIN)/python -m venv --without-pip "$$outside/venv"; \
	python=$$outside/venv/bin/python; \
	$(BIN)/python -m pip --python "$$python" install --quiet --no-deps --no-index dist/*.whl; \
	site=`"$$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`; \
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$site/packages.pth"; \
	cd "$$outside"; \
	"$$python" -m mypy --config-file "$$repo/pyproject.toml" --cache-dir "$$repo/.mypy_cache" --strict -p pico_edge; \
	"$$python" -c 'from importlinter.cli import lint_imports_command as run; run()' --config "$$repo/pyproject.toml"

bench: .venv/.dev
	$(BIN)/python benchmarks/regression.py

# PEERS_ARGS="--shapes 4x128 --rounds 1" for a part.
bench-peers: .venv/.all
	$(BIN)/python benchmarks/peers.py all $(PEERS_ARGS)

clean:
	rm -rf build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache $(DEMO_FILES)
	find pico_edge train export runtime tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
