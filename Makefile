# Each target is one command of README.md, CONTRIBUTING.md or docs/gpu.md.
PYTHON ?= python3

.PHONY: test lint bench gpu

test:
	$(PYTHON) -m pytest

lint:
	ruff check . && ruff format --check .

bench:
	$(PYTHON) -m pytest benchmarks/ --benchmark-only

# Everything that needs a GPU; options in GPU, such as: make gpu GPU='--parts tests,bench --minutes 5'
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU)
