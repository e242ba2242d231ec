PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
RUN := outputs/demo
# Their runtimes are a process's own: in one that had loaded all of them, later forks have crashed.
NATIVE := $(addprefix tests/test_,$(addsuffix .py,bench exporting formats formats_torch hub int8 \
  predict preprocess serve))

.PHONY: demo test check clean

demo: $(READY)  ## train a RepVGG on real digits, fold it, show that nothing changed
	rm -rf $(RUN)
	$(BIN)/python train.py hydra.run.dir=$(RUN)
	$(BIN)/python deploy.py ckpt=$(RUN)/checkpoints/best.ckpt
	@echo "Look at $(RUN)/deploy/report.html and $(RUN)/curves.png"

test: $(READY)  ## run all tests
	$(BIN)/python -m pytest $(NATIVE:%=--ignore=%)
	printf '%s\n' $(NATIVE) | xargs -P 2 -n 1 $(BIN)/python -m pytest -n 0

check: $(READY)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	touch $(READY)

clean:
	rm -rf .venv build dist
