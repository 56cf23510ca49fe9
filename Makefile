# `make demo` and `make test` work from a bare checkout: they make .venv themselves.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := demo

.PHONY: demo weights test test-slow faults lint setup clean

setup: $(VENV)/ready

$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.txt
	$(RUN) -m pip install --quiet -e ".[test]"
	touch $@

# From the built-in weights in a few minutes: the windows of house fronts, before and after. The images have 256 pixels;
# seen at 384, not at the model's 768, a step takes a fraction of the time, which leaves time for more of them.
demo: setup
	rm -rf $(DEMO)
	$(RUN) -c "from pathlib import Path; from finestsam.data.synthetic import FACADES, write_scenes as write; \
		write(Path('$(DEMO)/dataset'), 64, seed=0, kinds=[FACADES]); \
		write(Path('$(DEMO)/unseen'), 6, seed=1, kinds=[FACADES])"
	$(RUN) -m finestsam --mode train --dataset $(DEMO)/dataset --sav_dir $(DEMO) --run_name run --model.type vit_tiny \
		--model.image_size 384 --num_epochs 7 --eval_interval 0
	$(RUN) -m finestsam --mode predict --input $(DEMO)/unseen/data/images --model.checkpoint $(DEMO)/run/best.pth \
		--out_dir $(DEMO)/predictions
	$(RUN) -m finestsam --mode evaluate --dataset $(DEMO)/unseen/data --model.checkpoint $(DEMO)/run/best.pth \
		--evaluate.clicks 0 --out_dir $(DEMO)/evaluation
	@echo
	@echo "before and after: $(DEMO)/evaluation/comparison.png"
	@echo "report:           $(DEMO)/evaluation/report.html"
	@echo "overlays:         $(DEMO)/predictions/*.png"
	@echo "json:             $(DEMO)/predictions/predictions.json"
	@echo "curves:           $(DEMO)/run/plots/all_metrics.png"
	@echo "weights:          $(DEMO)/run/best.pth, described by best.json beside it"

# The built-in weights again, from nothing: some hours on two cores, goes on where it was stopped.
weights: setup
	$(RUN) -m recipes.builtin_weights.make --out_dir weights

# A process a core; one that is done takes half of what another still has to do.
PYTEST := $(RUN) -m pytest -q -n auto --maxprocesses 4 --dist worksteal --durations 10

test: setup
	$(PYTEST)

# About twenty minutes on two cores.
test-slow: setup
	$(PYTEST) -m slow

# Kills, signals, full disks, broken files: about twenty minutes of one core, and longer beside other work.
faults: setup
	$(RUN) -m benchmarks.faults

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf $(VENV) $(DEMO)
