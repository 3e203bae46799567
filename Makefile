# One virtual environment serves every target; it is brought up to date when pyproject.toml or constraints.txt changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := torch==2.13.0

.PHONY: demo test setup lint check docs release bench bench-recall bench-sampling bench-scoring bench-factorize bench-indexing bench-search bench-serve bench-stop bench-width bench-scale clean

demo: setup
	$(BIN)/axn demo --out runs/demo

test: setup lint
	@echo "== unit tests, two files at a time"
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not cluster and not gpu"
	@echo "== tests on a cluster of several nodes"
	$(BIN)/python -m pytest -m "cluster and not gpu"

lint: setup
	@echo "== ruff and mypy"
	$(BIN)/ruff check .
	$(BIN)/mypy

# What a release is judged by beside its tests: known vulnerabilities of the pinned versions, and a bill of materials with
# their licences. pip-audit names the packages for which the registry answers no such question.
check: lint
	test -x .venv-check/bin/pip-audit || ($(PYTHON) -m venv .venv-check && .venv-check/bin/python -m pip install --quiet pip-audit cyclonedx-bom)
	@echo "== vulnerabilities"
	.venv-check/bin/pip-audit --disable-pip --no-deps -r constraints.txt
	@echo "== bill of materials: dist/sbom.json"
	mkdir -p dist
	.venv-check/bin/cyclonedx-py environment $(VENV) --pyproject pyproject.toml -o dist/sbom.json

# The documentation site, in site/; a broken link or reference fails. Look at it: $(BIN)/python -m http.server -d site
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Wheel and sdist, and a small demo in an empty environment that has the wheel alone.
release: setup
	rm -rf dist/*.whl dist/*.tar.gz .venv-release
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	.venv-release/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(ls $(CURDIR)/dist/*.whl)[sample]"
	cd .venv-release && bin/axn demo --train-queries 60 --per-query 20 --out demo

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "== installing into $(VENV) (about two minutes the first time)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "axn-ray needs Python 3.11 or newer; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[sample,dev]"
	@touch $(READY)

# Benchmarks run with numpy's own choice of kernels.
BENCH := env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m

# A peer that is measured beside us, in an environment of its own, for its pins clash with ours.
PEER := .venv-peer/bin/infinity_emb
$(PEER):
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" "infinity-emb[server,torch]==0.0.78"

bench: bench-recall bench-sampling bench-scoring bench-factorize bench-indexing bench-search bench-serve bench-stop bench-width bench-scale

# SECTIONS="verbs distilled record" runs some of it, KNOWN="DIR DIR" names scores to look pairs up in; see the module.
bench-recall: setup
	$(BENCH) tests.benchmarks.recall $(SECTIONS) $(if $(KNOWN),--known $(KNOWN))

bench-sampling: setup
	$(BENCH) tests.benchmarks.sampling

# Sections that were measured are kept in runs/bench-factorize; `implicit` is in the extra `bench`. SECTION=many_items needs 40 GB
# of disk and runs only when named.
bench-factorize: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BENCH) tests.benchmarks.factorize $(SECTION)

bench-indexing: setup
	$(BENCH) tests.benchmarks.indexing

# Sections that were measured are kept in runs/bench-scoring; SECTIONS="rates memory" measures some of them.
bench-scoring: setup $(PEER)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BENCH) tests.benchmarks.scoring $(SECTIONS)

bench-search: setup
	$(BENCH) tests.benchmarks.search

# Sections that were measured are kept in runs/bench-serve; SECTIONS="sample peer" measures some of them.
bench-serve: setup $(PEER)
	$(BENCH) tests.benchmarks.serve $(SECTIONS)

# On what `make bench-recall SECTIONS=verbs` has made.
bench-stop: setup
	$(BENCH) tests.benchmarks.stop

# Stages that were made are kept in runs/bench-recall/width.
bench-width: setup
	$(BENCH) tests.benchmarks.width

# Stages that were measured are kept in runs/bench-scale; SECONDS=400 ends a run after that long, and the next goes on.
bench-scale: setup
	$(BENCH) tests.benchmarks.scale $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SIZES),--sizes $(SIZES))

clean:
	rm -rf .venv-check .venv-release .venv-peer runs site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
