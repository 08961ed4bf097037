# Every target works from a bare clone: it makes .venv first, with exact versions (constraints.txt).
# uv, not pip, because torchvision needs the build of torch that PyPI holds, and pip may pick another.

PYTHON ?= python3.11
PACKAGES = data_prep pretrain eval
RUN = .venv/bin/python

.PHONY: demo check-demo test test-slow test-slurm soak lint bench clean

demo: .venv/ready                ## the whole pipeline, on data it makes: about nine minutes on two cores
	@echo "1 of 5  Making pictures, sounds and captions."
	@$(RUN) -m data_prep.make_demo_data configs/data_prep/demo_data.yaml
	@echo "2 of 5  Packing them into shards."
	@for set in digits scenes sounds objects; do for split in train validation test; do \
		$(RUN) -m data_prep.make_shards configs/data_prep/demo_$$set.yaml \
			input=demo/data/$$set/$$split.tsv output=demo/datasets/$${set}_$$split || exit; \
	done; done
	@echo "3 of 5  Training one model of images, sounds and text, in two processes."
	@.venv/bin/accelerate launch --config_file configs/accelerate/two_processes.yaml \
		-m pretrain.train configs/pretrain/demo.yaml
	@echo "4 of 5  Training it further, on images together with sounds."
	@.venv/bin/accelerate launch --config_file configs/accelerate/two_processes.yaml \
		-m pretrain.train configs/pretrain/demo_objects.yaml run.parent=demo/run run.fork.schedule=restart
	@echo "5 of 5  Measuring both on what they have never seen."
	@$(RUN) -m eval.evaluate configs/eval/demo.yaml
	@$(RUN) -m eval.evaluate configs/eval/demo_objects.yaml

check-demo: demo                 ## fails if the demo's metrics are below their goals
	$(RUN) -m pytest tests/docs/demo_goals.py

# Two at a time, whole files to each: most tests have seconds in which only one process computes.
test: .venv/ready                ## the fast tests: under eight minutes on two cores
	$(RUN) -m pytest -n 2 --dist loadgroup --durations=25

test-slow: .venv/ready           ## more combinations of strategies, processes and losses
	$(RUN) -m pytest -m slow -n 2 --dist loadgroup

# The demo is what the jobs train, and its metrics are what they must come to.
test-slurm: demo                 ## jobs on a real Slurm, which it installs: root on Debian, half an hour
	$(RUN) -m pytest tests/slurm -m slurm $(SLURM_TESTS)

soak: .venv/ready                ## all combinations, 260 random runs: 35 to 60 minutes
	$(RUN) -m pytest -m exhaustive -n 2 --dist loadgroup
	$(RUN) -m tests.support.killed_runs 1000 200
	$(RUN) -m tests.support.random_runs $$(date +%s) 60

lint: .venv/ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

bench: .venv/ready
	for benchmark in $(patsubst tests/benchmarks/%.py,%,$(filter-out %/__init__.py,$(wildcard tests/benchmarks/*.py))); do \
		$(RUN) -m tests.benchmarks.$$benchmark; done

clean:
	rm -rf .venv demo

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	.venv/bin/uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable '.[dev]'
	touch .venv/ready
