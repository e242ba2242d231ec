PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
RUN := outputs/demo

.PHONY: demo test check resolve clean

demo: $(READY)  ## train a RepVGG on real digits, fold it, show that nothing changed
	rm -rf $(RUN)
	$(BIN)/python train.py hydra.run.dir=$(RUN)
	$(BIN)/python deploy.py ckpt=$(RUN)/checkpoints/best.ckpt
	@echo "Look at $(RUN)/deploy/report.html and $(RUN)/curves.png"

test: $(READY)  ## run all tests
	$(BIN)/python -m pytest

check: $(READY)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

EXTRAS := coreml,ray,timm
resolve: $(READY)  ## can the extras that "dev" leaves out be installed with the constraints? (a network)
	$(BIN)/pip install --quiet --disable-pip-version-check --dry-run -e ".[$(EXTRAS)]" -c constraints.txt

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	touch $(READY)

clean:
	rm -rf .venv build dist
