# `make demo` and `make test` work from a bare checkout: they make .venv themselves.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := demo

.PHONY: demo test test-slow faults lint setup clean

setup: $(VENV)/ready

$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.txt
	$(RUN) -m pip install --quiet -e ".[test]"
	touch $@

# From random weights in a few minutes: every part at work, and masks that are rough patches around the points asked at.
demo: setup
	rm -rf $(DEMO)
	$(RUN) -c "from pathlib import Path; from finestsam.data.scenes import write_scenes; \
		write_scenes(Path('$(DEMO)/dataset'), count=48, seed=0); write_scenes(Path('$(DEMO)/unseen'), count=4, seed=1)"
	$(RUN) -m finestsam --mode train --dataset $(DEMO)/dataset --sav_dir $(DEMO) --run_name run \
		--model.type vit_tiny --model.image_size 256 --model.checkpoint none \
		--model_layer.freeze.image_encoder false --model_layer.freeze.prompt_encoder false \
		--opt.learning_rate 1e-3 --sched.LambdaLR.steps [350,480] --sched.LambdaLR.decay_factor 3 \
		--losses.resolution low --losses.focal_ratio 10 --losses.affinity_ratio 10 --dataset.max_objects 16 \
		--dataset.background_points 16 --evaluate.goal f1 --num_epochs 14 --eval_interval 7
	$(RUN) -m finestsam --mode predict --input $(DEMO)/unseen/data/images --model.checkpoint $(DEMO)/run/best.pth \
		--out_dir $(DEMO)/predictions
	$(RUN) -m finestsam --mode evaluate --dataset $(DEMO)/unseen/data --model.checkpoint $(DEMO)/run/best.pth \
		--out_dir $(DEMO)/evaluation
	@echo
	@echo "overlays: $(DEMO)/predictions/*.png"
	@echo "json:     $(DEMO)/predictions/predictions.json"
	@echo "report:   $(DEMO)/evaluation/report.html"
	@echo "curves:   $(DEMO)/run/plots/all_metrics.png"
	@echo "weights:  $(DEMO)/run/best.pth, described by best.json beside it"

test: setup
	$(RUN) -m pytest -q

test-slow: setup
	$(RUN) -m pytest -q -m slow

# Kills, signals, full disks, broken files: about half an hour on two cores.
faults: setup
	$(RUN) -m benchmarks.faults

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf $(VENV) $(DEMO) sav out
