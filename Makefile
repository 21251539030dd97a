# For developers, in an active environment made by: pip install -e '.[test]' -c constraints.txt
PYTHON ?= python

.PHONY: build kernels lint sanitizers test bench

build:  # recompile what changed and copy the extension to qdeploy/
	CMAKE_ARGS="-DCMAKE_COMPILE_WARNING_AS_ERROR=ON $(CMAKE_ARGS)" $(PYTHON) setup.py -q build_ext --inplace

kernels lint sanitizers:
	.ci/run $@

test: build
	pytest -n 2 --dist loadfile

bench: build
	pytest bench --benchmark-only
