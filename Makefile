# Two commands: `make demo` and `make test`. Each makes .venv first if it is not there.
PYTHON ?= python3
BIN := .venv/bin

HF_TESTS := .venv/transformers-tests
TOOLS := .venv/release-tools

.PHONY: demo test test-thorough conform conformance-score bench docs lint javascript lock dist sbom licences audit versions workflows clean

demo: .venv/.ready
	@$(BIN)/python examples/demo.py

# What JAX has compiled once it need not compile again, in another process or on another day. The size has it lock the folder.
JAX_CACHE := JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.venv/jax-cache JAX_COMPILATION_CACHE_MAX_SIZE=2147483648 \
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=0

# One thread per worker: two workers on two cores would otherwise fight over them.
test: .venv/.ready $(HF_TESTS)/.ready
	@OMP_NUM_THREADS=1 $(JAX_CACHE) $(BIN)/python -m pytest -n auto --dist worksteal -q -m "not thorough"

# The cases that `make test` leaves out to be done in five minutes.
test-thorough: .venv/.ready $(HF_TESTS)/.ready
	@OMP_NUM_THREADS=1 $(JAX_CACHE) $(BIN)/python -m pytest -n auto --dist worksteal -q -m thorough

# The standard tier of the conformance suite on every port, two at a time.
conform: .venv/.ready
	@printf '%s\n' jax torch mlx numpy | OMP_NUM_THREADS=1 $(JAX_CACHE) xargs -P 2 -I '{}' sh -c '$(BIN)/bdh-conform {} --device cpu --quiet || exit 255'

conformance-score: .venv/.ready
	@OMP_NUM_THREADS=1 $(BIN)/python -m bdh_conformance.score

# Three minutes: the rows of the README's table that a CPU can do in that time. `bdh-bench all` does every row.
BENCH_ROWS := forward T=512,decode B=1 context=512,convert verified
bench: .venv/.ready
	@$(BIN)/bdh-bench all --backend torch --device cpu --rows '$(BENCH_ROWS)' --rounds 2 --max-seconds 80 --budget 150 --json bench.json --plot bench.png

# The pages as a site, site/index.html: a link that leads nowhere ends it red. Nothing is fetched; the variable mutes an advertisement.
docs: .venv/.ready
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo site/index.html

lint: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What the live page takes of d3, bundled into one module. It lies in the repository, so only a change of it takes npm.
javascript:
	@cd look/vendor && npm ci --silent && npm run --silent build

# What is locked, by hash: versions are chosen in constraints.txt.
lock: $(TOOLS)/.ready
	@PATH="$(CURDIR)/$(TOOLS)/bin:$$PATH" $(BIN)/python .ci/lock

# The last commit as a source distribution and a wheel, built twice and compared byte for byte.
dist: .venv/.ready
	@.ci/dist

# Every package that is installed for `make test`, with its licence.
sbom: $(TOOLS)/.ready
	@mkdir -p dist
	@$(TOOLS)/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible --of JSON -o dist/bdh-spec.cdx.json

# torchao's wheel does not name its licence, which is BSD-3-Clause. chardet and dominate, under the LGPL, are fetched with lm-eval for
# a test, and are no part of what is shipped.
licences: $(TOOLS)/.ready
	@$(TOOLS)/bin/pip-licenses --python $(BIN)/python --from mixed --format plain --partial-match --ignore-packages torchao chardet dominate \
	  --fail-on 'GPL;General Public License;SSPL;Commons Clause;Proprietary;UNKNOWN'

# Needs a service that knows of vulnerabilities: a package that it cannot tell about is a failure.
audit: $(TOOLS)/.ready
	@$(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes -r requirements.lock

versions: $(TOOLS)/.ready
	@PATH="$(CURDIR)/$(TOOLS)/bin:$$PATH" .ci/versions $(ENVIRONMENTS)

workflows: $(TOOLS)/.ready
	@$(TOOLS)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

.venv/.ready: pyproject.toml constraints.txt
	@echo "Installing NumPy, PyTorch, MLX, JAX and transformers for the CPU into .venv: a few minutes the first time" >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

$(TOOLS)/.ready: .ci/release-tools.lock .venv/.ready
	@rm -rf $(TOOLS)
	@$(BIN)/python -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .ci/release-tools.lock
	@touch $@

# The source distribution of transformers carries the tests of its own models, which are run on ours.
$(HF_TESTS)/.ready: .venv/.ready
	@rm -rf $(HF_TESTS)
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check -c constraints.txt --no-deps --no-binary transformers -d $(HF_TESTS) transformers
	@for source in $(HF_TESTS)/*.tar.gz; do tar -xzf "$$source" -C $(HF_TESTS) "$$(basename "$$source" .tar.gz)/tests" || exit 1; done
	@touch $@

clean:
	rm -rf .venv demo-output dist site
