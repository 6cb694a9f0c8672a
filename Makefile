# `make demo` and `make test` set up what is missing and then run; nothing else is needed.
PYTHON ?= python3
VENV ?= .venv
CRD := $(VENV)/bin/crd
export HF_HUB_OFFLINE := 1

.PHONY: demo figures test test-extras lint types unit clean

demo: $(VENV)/.ready
	$(CRD) train recipes/nano-ocr.yaml output_dir=runs/demo
	$(CRD) train recipes/nano-ocr-anchor-alone.yaml output_dir=runs/demo-anchor-alone
	$(CRD) report runs/demo --control runs/demo-anchor-alone

# the figures of the documentation
figures: demo
	cp runs/demo/before_after.png runs/demo/curves.png docs/figures/

test: lint types unit

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check src tests examples benchmarks
	$(VENV)/bin/ruff format --check src tests examples benchmarks

types: $(VENV)/.ready
	$(VENV)/bin/mypy

unit: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -n 2

# what needs packages that `make test` leaves out; DeepSpeed compiles for a minute or two
test-extras: $(VENV)/.ready
	$(VENV)/bin/pip install --quiet -c constraints.txt -e '.[dev,deepspeed,int8]'
	PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/python -m pytest tests/test_zero.py tests/test_memory.py

# torch first and pinned, so that nothing pulls another build of it
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet torch==2.13.0
	$(VENV)/bin/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
