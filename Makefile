# Two commands matter: `make run` brings up a node, `make test` runs every test that this machine can run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SUBPACKAGES := dashboard discovery node partition transport
ARGS ?=

NATIVE := node/engine/cpu/native
NATIVE_FILES := $(wildcard $(NATIVE)/*)
NATIVE_OBJECTS = $(patsubst $(NATIVE)/%.cpp,$(1)/%.o,$(wildcard $(NATIVE)/*.cpp))
# gcc 12 finds fault with its own AVX-512 header.
NATIVE_FLAGS := -std=c++17 -fno-math-errno -ffp-contract=off -Wall -Wextra -Wno-maybe-uninitialized -pthread
NATIVE_TESTS := tests/unit/test_native_*.py tests/property/test_native_*.py
ASAN := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
CROSS := aarch64-linux-gnu-g++
EMULATOR := qemu-aarch64-static

.PHONY: run test lint format links native asan tsan neon bench lab fuzz simulate soak models clean help

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: $(VENV)/.installed $(VENV)/.native ## start a node with the default model (ARGS="--memory 4GB" passes options)
	@exec $(BIN)/swarmd $(ARGS)

test: $(VENV)/.dev-installed $(VENV)/.native ## all tests that need neither a GPU nor what is missing here (those skip, with the reason)
	$(BIN)/python -m pytest $(ARGS)
	@if [ -d dashboard/web/node_modules ]; then PATH="$(CURDIR)/$(BIN):$$PATH" npm --prefix dashboard/web test; fi

lint: $(VENV)/.dev-installed links ## ruff and basedpyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(VENV)/.dev-installed ## let ruff format and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

native: ## build the CPU kernels anew
	@rm -f $(VENV)/.native
	@$(MAKE) --no-print-directory $(VENV)/.native

asan: $(VENV)/.dev-installed build/asan/native.so ## the kernels' tests with the address and undefined-behaviour sanitizers
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 SWARMD_NATIVE_LIBRARY=build/asan/native.so \
	$(BIN)/python -m pytest -p no:cacheprovider $(NATIVE_TESTS) $(ARGS)

# Without address randomization: older sanitizers do not know where newer kernels put things.
tsan: build/tsan/selftest ## the kernels' self-test with the thread sanitizer
	setarch -R $<

neon: ## the kernels' self-test for 64-bit ARM, in an emulator
	@if command -v $(CROSS) >/dev/null && command -v $(EMULATOR) >/dev/null; \
	then $(MAKE) --no-print-directory build/neon/selftest && $(EMULATOR) -cpu max build/neon/selftest; \
	else echo "skipped: it needs $(CROSS) and $(EMULATOR) (apt install g++-aarch64-linux-gnu qemu-user-static)"; fi

bench: $(VENV)/.dev-installed $(VENV)/.native ## measurements, one table each
	$(BIN)/python bench/help_time.py
	$(BIN)/python bench/link_latency.py
	$(BIN)/python bench/discovery_time.py
	$(BIN)/python bench/lab.py nodes

lab: $(VENV)/.dev-installed $(VENV)/.native ## the bars, or ARGS="SCENARIO ... --llama-cpp FOLDER" (bench/METHOD.md)
	$(BIN)/python bench/lab.py $(ARGS)

fuzz: $(VENV)/.dev-installed $(VENV)/.native ## damaged input for every parser, one process (ARGS="--inputs N --seconds S --seed N --target NAME")
	PYTHONPATH=tests nice -n 10 $(BIN)/python -m fuzz $(ARGS)

simulate: $(VENV)/.dev-installed $(VENV)/.native ## seeded faults in virtual swarms (ARGS="--schedules N --nodes N --seed N --events")
	PYTHONHASHSEED=0 PYTHONPATH=tests nice -n 10 $(BIN)/python -m support.virtual_swarm.schedule $(ARGS)

soak: $(VENV)/.dev-installed $(VENV)/.native ## half an hour of load and trouble, nothing lost (ARGS="--seconds 600 --seed 1")
	$(BIN)/python bench/soak.py $(ARGS)

models: $(VENV)/.dev-installed $(VENV)/.native ## docs/models.md: what works, from tests that it runs (ARGS=FILE: from their JUnit file)
	$(BIN)/python bench/model_tables.py $(ARGS)

links: ## build/links/swarmd -> the root's folders, for type checkers and editors
	@mkdir -p build/links/swarmd
	@for part in $(SUBPACKAGES); do ln -sfn ../../../$$part build/links/swarmd/$$part; done

clean: ## forget everything that was built
	rm -rf $(VENV) build dist *.egg-info $(NATIVE)/../_native*.so dashboard/static dashboard/web/node_modules
	rm -rf .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "swarmd needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade -c constraints.txt pip

# pip keeps a build's warnings to itself.
CHECK_KERNELS = ls $(NATIVE)/../_native*.so >/dev/null 2>&1 || echo "the CPU kernels were not built, so swarmd will be slow;\
	install a C++ compiler (apt install g++), then run: make native" >&2

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing swarmd into $(VENV) (the first time this brings PyTorch and takes some minutes)"
	$(PIP) install -c constraints.txt -e .
	@touch $@ $(VENV)/.native
	@$(CHECK_KERNELS)

$(VENV)/.dev-installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed $(VENV)/.native
	@$(CHECK_KERNELS)

$(VENV)/.native: $(NATIVE_FILES) | $(VENV)/bin/python
	$(PIP) install --quiet --no-deps -c constraints.txt -e .
	@touch $@
	@$(CHECK_KERNELS)

build/asan/native.so: $(call NATIVE_OBJECTS,build/asan)
	$(CXX) $(ASAN) -shared -pthread $^ -o $@

build/asan/%.o: $(NATIVE)/%.cpp $(NATIVE_FILES)
	@mkdir -p $(@D)
	$(CXX) -O1 -g -fPIC $(NATIVE_FLAGS) $(ASAN) -c $< -o $@

build/tsan/selftest: tests/native/selftest.cpp $(call NATIVE_OBJECTS,build/tsan)
	$(CXX) -O1 -g $(NATIVE_FLAGS) -fsanitize=thread -I$(NATIVE) $^ -o $@

build/tsan/%.o: $(NATIVE)/%.cpp $(NATIVE_FILES)
	@mkdir -p $(@D)
	$(CXX) -O1 -g $(NATIVE_FLAGS) -fsanitize=thread -c $< -o $@

build/neon/selftest: tests/native/selftest.cpp $(call NATIVE_OBJECTS,build/neon)
	$(CROSS) -O2 -static $(NATIVE_FLAGS) -I$(NATIVE) $^ -o $@

build/neon/%.o: $(NATIVE)/%.cpp $(NATIVE_FILES)
	@mkdir -p $(@D)
	$(CROSS) -O3 $(NATIVE_FLAGS) -c $< -o $@
