# For developers, in an active environment made by: pip install -e '.[test]' -c constraints.txt
PYTHON ?= python
PYTHONS ?= $(wildcard $(foreach minor,10 11 12 13,$(HOME)/.pyenv/versions/3.$(minor).*/bin/python))

.PHONY: build kernels lint sanitizers test bench wheels

build:  # recompile what changed and copy the extension to qdeploy/
	CMAKE_ARGS="-DCMAKE_COMPILE_WARNING_AS_ERROR=ON $(CMAKE_ARGS)" $(PYTHON) setup.py -q build_ext --inplace

kernels lint sanitizers:
	.ci/run $@

test: build
	pytest -n 2 --dist loadfile

bench: build
	pytest bench --benchmark-only

wheels:  # the source distribution and the wheels for PYTHONS, into dist/, and the demo from each of them
	$(PYTHON) wheels/build.py $(PYTHONS)
	$(PYTHON) wheels/check.py $(PYTHONS)
