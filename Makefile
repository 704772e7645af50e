# Each target does all its set-up itself; `make` alone says what there is.
.DEFAULT_GOAL := help
.PHONY: help venv check test test-all demo clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

venv: ## make .venv (once; needs Python >= 3.12 and 5 GB, about two minutes)
	@tools/make_venv.sh

check: venv ## format, lint, types, layers, file sizes and the fast tests (about 2 minutes)
	@tools/check

test: venv ## the tests, the real Megatron on CPUs included (about 12 minutes on 2 cores)
	@tools/test

test-all: venv ## all tests, long ones too, then the whole proof into build/proof.md (under 50 minutes)
	@tools/test -m ''
	@mkdir -p build
	@.venv/bin/megasft prove --max-ranks 8 --report build/proof.md

demo: venv ## the quickstart: from text to an answering model, TP 2 x CP 2, then DP 2 x PP 2
	@examples/quickstart/run.sh

clean: ## remove caches, builds and the demo's folder; keep .venv
	@rm -rf build dist ./*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@if [ -e demo/.made-by-quickstart ]; then rm -rf demo; fi
	@find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +
