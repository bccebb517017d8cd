# Two commands work in a fresh clone, with nothing else prepared: `make demo` and `make test`.
#
# PYTHON=...  the interpreter (default python3). If it imports torch it is used as it is and nothing
#             is installed into it; otherwise torch goes into .venv (.ci/prepare).
# ARGS=...    more arguments for the demo, pytest or the benchmark.

PYTHON ?= python3
ARGS ?=
RUN := build/run
# As many processes as cores, at most 4 (tests/conftest.py); what shares workers or a GPU stays together.
PARALLEL := -n auto --dist loadgroup
SOURCES := $(wildcard csrc/*.cpp csrc/*/*)

# A launcher made for another interpreter, or for one that is gone, is out of date.
asked := $(shell command -v $(PYTHON))
alive := $(shell build/run python -c "" 2>/dev/null && cat build/asked)
stale := $(if $(filter $(asked),$(alive)),,FORCE)

.PHONY: extension help demo test test-fast test-newest lint types format docs bench info clean \
	distclean FORCE

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: extension ## train a small MoE transformer with DualPipeV, on all GPUs or 4 CPU processes
	$(RUN) python examples/train_pipeline.py $(ARGS)

test: extension ## every test that this machine can run
	$(RUN) python -m pytest $(PARALLEL) $(ARGS)

test-fast: extension ## the quick ones of them: no GPU, no long compilation, no many processes
	$(RUN) python -m pytest $(PARALLEL) -m "not slow and not gpu and not gpu_2 and not gpu_4" $(ARGS)

# What knows torch and Triton best: private names, operators, layers, launches, and every kernel
# compiled.
NEWEST := package/test_compat.py package/test_import.py ops/test_contract.py ops/test_heads.py \
	moe/test_layer.py gradients blocks/test_attention_segment.py triton_kernels/test_launch.py \
	triton_kernels/test_ahead_of_time.py

test-newest: extension ## some of the tests on the newest torch and Triton (5.5 GB, in .venv-newest)
	.ci/prepare newest
	PYTHONPATH=. .venv-newest/bin/python -m pytest $(PARALLEL) \
		$(NEWEST:%=tests/%) $(ARGS)

lint: build/linters ## ruff and clang-format, without changing files
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) clang-format --dry-run -Werror $(SOURCES)

types: build/linters ## mypy, strict, over the package and tests/consumer.py, which uses it
	$(RUN) python -m mypy

format: build/linters ## let ruff and clang-format rewrite the files
	$(RUN) ruff check --fix .
	$(RUN) ruff format .
	$(RUN) clang-format -i $(SOURCES)

docs: build/documents ## documents and API as a site in build/site (mkdocs, in .venv-docs)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

bench: extension ## time the exchange over a sweep of comm_sms (needs GPUs)
	$(RUN) python -m bench sm_split $(ARGS)

info: extension ## versions, GPUs, what was built, which backend is chosen and why
	@$(RUN) python -m dualpipe_ext.cli info

clean: ## remove what was built, keep .venv
	rm -rf build dist *.egg-info dualpipe_ext/_C*.so dualpipe_ext/_build.json
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis

distclean: clean ## remove .venv, .venv-newest, .venv-docs and .deps as well
	rm -rf .venv .venv-newest .venv-docs .deps

build/run: .ci/prepare $(stale)
	.ci/prepare python "$(PYTHON)"

build/linters: build/run
	.ci/prepare linters

build/documents: build/run
	.ci/prepare docs

# Asked every time, because pip can have built or removed it since: 0.3 s if nothing has changed.
extension: build/run
	@if $(RUN) python -c "import setuptools" 2>/dev/null; \
	then $(RUN) python setup.py -q build_ext --inplace; \
	else echo "setuptools is missing: going on without the CUDA kernels" >&2; fi
