# Every target works from a bare clone: it makes .venv first, with exact versions (constraints.txt).
# uv, not pip, because torchvision needs the build of torch that PyPI holds, and pip may pick another.

PYTHON ?= python3.11
PACKAGES = data_prep pretrain eval
RUN = .venv/bin/python

.PHONY: demo test lint bench clean

demo: .venv/ready                ## the whole pipeline on data it makes: about five minutes
	TODO

test: .venv/ready
	$(RUN) -m pytest

lint: .venv/ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

bench: .venv/ready
	for benchmark in tests/benchmarks/*.py; do $(RUN) $$benchmark; done

clean:
	rm -rf .venv demo

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	.venv/bin/uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable '.[dev]'
	touch .venv/ready
