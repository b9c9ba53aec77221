# Each target is one command of README.md, CONTRIBUTING.md or docs/gpu.md.
PYTHON ?= python3

.PHONY: exhaustive test versions lint bench sdist wheel hub clean gpu

test:
	$(PYTHON) -m pytest

# The oldest torch and the newest; options in VERSIONS, such as: make versions VERSIONS='2.9.1 --python python3.13'
versions:
	$(PYTHON) -m tests.versions $(VERSIONS)

exhaustive:
	$(PYTHON) -m pytest -m exhaustive

lint:
	ruff check . && ruff format --check .

bench:
	$(PYTHON) -m pytest benchmarks/ --benchmark-only

sdist:
	$(PYTHON) -c "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"

# For other machines. Torch's OpenMP runtime is the module's, so no other goes in. Needs the extra dev.
wheel:
	rm -rf build/wheel
	$(PYTHON) -m pip wheel . --no-deps -w build/wheel $(PIP)
	$(PYTHON) -m auditwheel repair --exclude libgomp.so.1 -w dist build/wheel/*.whl

# What the kernels library of Hugging Face loads: Triton and plain PyTorch, for every Python and torch.
hub:
	$(PYTHON) hub_kernel.py dist/hub

clean:
	rm -rf build dist *.egg-info dsts_kernels/_C.*so dsts_kernels/_C.*pyd dsts_kernels/_build.*

# Everything that needs a GPU; options in GPU, such as: make gpu GPU='--parts tests,bench --minutes 5'
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU)
