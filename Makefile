# Every verb works alone on a fresh Debian/Ubuntu machine with Python 3.11+ and make; what it builds is reused next time.
#
#   make demo                        two real vLLM servers share KV cache through etcd, a store node and the router
#   make demo-sglang                 the same with SGLang's servers
#   make test                        everything: check, unit, property, contract, engine and end-to-end tests
#   make check                       ruff, mypy, import-linter and the house rules; seconds
#
# PYTHON=python3.12   the interpreter that the environments are made with
# VLLM_VENV=DIR       use this environment with vLLM as it is, instead of building .venv-vllm
# SGLANG_VENV=DIR     the same for SGLang and .venv-sglang
# MODEL=DIR           use this Hugging Face model folder, instead of converting one
# ARGS="..."          further arguments for demo, bench and the pytest verbs

PYTHON    ?= python3
VENV      := .venv
VLLM_VENV ?= .venv-vllm
SGLANG_VENV ?= .venv-sglang
MODEL     ?= .cache/models/smollm2
ARGS      ?=

export VLLM_VENV := $(abspath $(VLLM_VENV))
export SGLANG_VENV := $(abspath $(SGLANG_VENV))
export MODEL := $(abspath $(MODEL))

MAKE_ENV := $(PYTHON) tests/environment/make_env.py --venv $(VENV) --vllm-venv $(VLLM_VENV) --sglang-venv $(SGLANG_VENV) \
	--model $(MODEL)
BIN      := $(VENV)/bin
PYTEST   := $(BIN)/python -m pytest

UNIT_TESTS   := tests/unit tests/property tests/fuzz tests/contract
# The demo first: the engine tests keep their servers until the session ends, and all together do not fit into 24 GB.
ENGINE_TESTS := tests/e2e tests/engine --ignore=tests/engine/sglang --ignore=tests/e2e/test_demo_sglang.py
SGLANG_TESTS := tests/e2e/test_demo_sglang.py tests/engine/sglang
RDMA_TESTS   := tests/rdma

.DEFAULT_GOAL := help
.PHONY: help demo demo-sglang test test-unit test-rdma test-engine test-sglang bench check docs env env-base env-sglang clean
# The verbs share two cores and one set of environments; one at a time.
.NOTPARALLEL:

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: env ## split prefill from decode and pool the cache, on real text (ARGS="--keep" leaves it running)
	$(BIN)/mooncake demo --python $(VLLM_VENV)/bin/python --model $(MODEL) $(ARGS)

demo-sglang: env-sglang ## the same on SGLang's servers
	$(BIN)/mooncake demo --engine sglang --python $(SGLANG_VENV)/bin/python --model $(MODEL) $(ARGS)

test: check ## every test there is; engines are installed, and the guest runs, beside the tests that need neither
	@setsid sh -c '$(MAKE_ENV) vllm model sglang && { $(PYTEST) $(RDMA_TESTS) $(ARGS) || exit 3; }' & beside=$$!; \
	trap 'kill -- -$$beside 2>/dev/null' EXIT INT TERM; \
	$(PYTEST) $(UNIT_TESTS) $(ARGS); failed=$$?; \
	wait $$beside; case $$? in 0) ;; 3) failed=1;; *) exit 1;; esac; trap - EXIT INT TERM; \
	$(PYTEST) $(ENGINE_TESTS) $(ARGS) || failed=$$?; \
	$(PYTEST) $(SGLANG_TESTS) $(ARGS) || failed=$$?; exit $$failed

test-unit: env-base ## unit, property and contract tests: no engine, no model
	$(PYTEST) $(UNIT_TESTS) $(ARGS)

test-rdma: env-base ## the rdma medium on real verbs, in a guest with soft-RoCE devices; needs root
	$(PYTEST) $(RDMA_TESTS) $(ARGS)

test-engine: env ## tests on the real processes: vLLM servers, router, etcd, store node
	$(PYTEST) $(ENGINE_TESTS) $(ARGS)

test-sglang: env-sglang ## tests on real SGLang servers
	$(PYTEST) $(SGLANG_TESTS) $(ARGS)

bench: env ## run every benchmark (ARGS="--quick" for a short run); writes out/*.json
	$(BIN)/python tests/environment/run_benchmarks.py --out out $(ARGS)

check: env-base ## ruff, mypy, import-linter, house rules, documentation
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --cache-dir .import_linter_cache --no-logo
	$(PYTEST) -q tests/test_house_rules.py
	$(BIN)/python tests/environment/check_docs.py

docs: env-base ## check links and commands in the documentation, and refresh the generated pages
	$(BIN)/python tests/environment/check_docs.py --write

env-base: ## build or reuse .venv: this package and the test tools
	@command -v $(firstword $(PYTHON)) >/dev/null || { echo "$(PYTHON) is not on PATH: apt install python3 python3-venv" >&2; exit 1; }
	@$(MAKE_ENV) base

env: env-base ## build or reuse .venv-vllm and the model too (some 4 GB, minutes the first time)
	@$(MAKE_ENV) vllm model

env-sglang: env-base ## build or reuse .venv-sglang and the model too (some 3 GB, minutes the first time)
	@$(MAKE_ENV) sglang model

clean: ## delete the environments, the model and every cache
	rm -rf .venv .venv-vllm .venv-sglang .cache build dist out demo.json demo.png .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
