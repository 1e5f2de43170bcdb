# make demo   install and compare the methods on digits, with a calibration report
# make test   install with the test tools, lint, type-check and run the suite
# make docs   build the documentation in docs/_build/html; a warning or a broken example is an error
# make tutorials   run the notebooks in full, in place
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One BLAS/OpenMP thread a process: two pytest workers on two cores beat four threads fighting.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test check format slow bench docs tutorials clean
.DEFAULT_GOAL := test

# The stamps make a second call skip the installation until the dependency lists change.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV): some minutes, most of them for torch"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/uq compare digits --out reports/digits

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check
	$(TEST_ENV) $(BIN)/pytest -n 2

slow: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/pytest -n 2 -m slow

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
# torchvision, which it asks for and does not use, breaks torchmetrics beside a torch without CUDA.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps \
		laplace-torch asdfghjkl backpack-for-pytorch curvlinops-for-pytorch einconv einops unfoldNd
	$(BIN)/python -m benchmarks.run speed

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/.installed-docs
	rm -rf docs/_build docs/api/generated
	$(TEST_ENV) $(BIN)/sphinx-build -j 2 -q -W --keep-going docs docs/_build/html
	$(BIN)/python docs/check_pages.py docs/_build/html
	$(TEST_ENV) $(BIN)/pytest -n 2 -q --doctest-glob='*.md' --ignore-glob='docs/*.py' docs uq

tutorials: $(VENV)/.installed-dev
	$(BIN)/python -m tutorials.run

clean:
	rm -rf $(VENV) reports .pytest_cache .mypy_cache .ruff_cache
