"""A training step of another objective: the trainer takes it as it takes the contrastive one."""

from tests.pretrain.test_train import steps_of
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_run import toy_config


def train_with_another_objective(config):
    """Trains to make the first component of all features large, in micro-batches."""
    from dataclasses import dataclass

    from pretrain import train
    from pretrain.training.gradient_cache import split_into_micro_batches

    @dataclass
    class Losses:
        total: float

        def row(self):
            return {"total_loss": self.total, "num_objectives": 1}

        def progress_text(self):
            return "objective first component"

    class FirstComponent:
        def __init__(self, engine):
            self.engine = engine

        def micro_batches(self, batch):
            return split_into_micro_batches(batch, num_micro_batches=2, trims_captions=False)

        def backward(self, batch, timer):
            total, micro_batches = 0.0, self.micro_batches(batch)
            for number, each in enumerate(micro_batches):
                with self.engine.micro_batch(is_last=number == len(micro_batches) - 1):
                    with timer.phase("forward"):
                        features = self.engine.forward([each])
                        used = [view for each in features.views.values() for view in each.values()]
                        loss = -sum(view[:, 0].sum() for view in used)
                        # All parameters take part, so that no process waits for a gradient.
                        loss = loss + 0.0 * sum(scale.sum() for scale in features.scales.values())
                    with timer.phase("backward"):
                        self.engine.backward(loss)
                total += loss.item()
            return Losses(total)

    train.build_step = lambda config, engine, **_: FirstComponent(engine)
    train.pretrain(config)


def test_the_trainer_takes_any_objective_and_reports_its_columns(toy_data, tmp_path):
    run_in_processes(1, train_with_another_objective, toy_config(toy_data, tmp_path / "run"))
    rows = steps_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert all(row["num_objectives"] == 1 and "logit_scale" not in row for row in rows)
    assert rows[-1]["total_loss"] < rows[0]["total_loss"]
