# Two commands: `make demo` and `make test`. Each makes .venv first if it is not there.
PYTHON ?= python3
BIN := .venv/bin

HF_TESTS := .venv/transformers-tests

.PHONY: demo test test-thorough conform conformance-score lint clean

demo: .venv/.ready
	@$(BIN)/python examples/demo.py

# One thread per worker: two workers on two cores would otherwise fight over them.
test: .venv/.ready $(HF_TESTS)/.ready
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -q -m "not thorough"

# The cases that `make test` leaves out to be done in five minutes.
test-thorough: .venv/.ready $(HF_TESTS)/.ready
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -q -m thorough

# The standard tier of the conformance suite on every port, two at a time.
conform: .venv/.ready
	@printf '%s\n' jax torch mlx numpy | OMP_NUM_THREADS=1 xargs -P 2 -I '{}' sh -c '$(BIN)/bdh-conform {} --device cpu --quiet || exit 255'

conformance-score: .venv/.ready
	@OMP_NUM_THREADS=1 $(BIN)/python -m bdh_conformance.score

lint: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/.ready: pyproject.toml constraints.txt
	@echo "Installing NumPy, PyTorch, MLX, JAX and transformers for the CPU into .venv: a few minutes the first time" >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

# The source distribution of transformers carries the tests of its own models, which are run on ours.
$(HF_TESTS)/.ready: .venv/.ready
	@rm -rf $(HF_TESTS)
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check -c constraints.txt --no-deps --no-binary transformers -d $(HF_TESTS) transformers
	@for source in $(HF_TESTS)/*.tar.gz; do tar -xzf "$$source" -C $(HF_TESTS) "$$(basename "$$source" .tar.gz)/tests" || exit 1; done
	@touch $@

clean:
	rm -rf .venv demo-output
