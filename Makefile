# One command per job. Each sets up what it needs in .venv first; a second call starts at once.
.DELETE_ON_ERROR:
.PHONY: demo test soak verify-boards counts bench-cnn bench-lm lint docs clean

PYTHON ?= python3.11
PY := .venv/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt
export OMP_NUM_THREADS ?= 1

demo: .venv/.demo  ## train a small CNN on real digits, quantize it, print the table, write report.html
	.venv/bin/roundel demo

test: .venv/.dev  ## all tests but the soak
	$(PY) -m pytest -n auto --dist loadfile

soak: .venv/.dev  ## the long counts: fuzzing, kills, nasty tensors (hours)
	$(PY) -m pytest -m soak

verify-boards: .venv/.dev  ## the long runs on every board that QEMU plays (minutes)
	$(PY) -m pytest -m soak -k boards

counts: .venv/.dev  ## instructions of DS-CNN on a Cortex-M4; 2 % more than scripts/instructions.json is a failure
	$(PY) scripts/instructions.py

bench-cnn: .venv/.dev  ## other toolkits on the same networks, each in an environment of its own (12 GB, hours); what is on record is kept
	$(PY) bench/harness.py install
	$(PY) bench/harness.py run

bench-lm: .venv/.dev  ## other toolkits on the same language models, or on MODEL=/any/folder (16 GB, hours); what is on record is kept
	$(PY) scripts/train_bench_lm.py $(HOME)/.cache/roundel/bench-lm-0
	$(PY) bench/harness.py install --lm
	$(PY) bench/harness.py run --lm $(if $(MODEL),--model $(MODEL))

lint: .venv/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	@$(PY) scripts/lines.py

docs: .venv/.dev  ## write the generated pages of docs/ anew
	$(PY) scripts/pages.py
	$(PY) scripts/status.py

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "Roundel needs Python 3.11: install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian: python3.11-venv)" >&2; exit 1; }

.venv/.demo: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Setting up .venv. To download: 275 MB (192 MB of it PyTorch for the CPU; gigabytes where your index has only its CUDA build)."
	@$(PIP) -e .
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/.demo
	@echo "Adding what the tests need. To download: 206 MB more (all-MiniLM-L6-v2 84 MB, onnxruntime 28 MB, LiteRT 22 MB)."
	@$(PIP) -e '.[dev]'
	@touch $@
