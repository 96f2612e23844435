# A thin front for cmake, ctest and tools/; `make help` lists what there is.
.DEFAULT_GOAL := build
.PHONY: help run test build eval check check-full format clean distclean deps models

JOBS ?= $(shell nproc)
export JOBS

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

run: build models  ## Build everything, fetch a small model, show the compressed cache at work
	tools/demo.sh

test: build models  ## Build everything and run all tests
	tools/fetch.py gemma3
	ctest --preset release -j2 --output-on-failure

build: deps  ## Build the release preset and what it needs (default)
	cmake --preset release
	cmake --build --preset release -j $(JOBS)

eval: build models  ## Measure predictions, speed and memory; put the tables into the docs (slow)
	eval/demo.py
	tools/fetch.py gemma3
	eval/results.py
	eval/speed.sh
	eval/memory.py
	eval/update_docs.py

check:  ## Format, development build, fast tests (check-full: sanitizers, clang-tidy, fuzzers too)
	tools/check.sh fast

check-full:
	tools/check.sh full

format:  ## Format all sources in place
	tools/check.sh format

clean:  ## Remove our own build trees; downloads, models and llama.cpp stay
	rm -rf $(addprefix build/,dev release asan tsan fuzz cuda)

distclean:  ## Remove build/ as a whole; the download cache outside of it stays
	rm -rf build

deps:
	tools/setup.sh
	tools/fetch.py llama.cpp
	tools/build_llama.sh

models: deps
	tools/fetch.py smollm2
