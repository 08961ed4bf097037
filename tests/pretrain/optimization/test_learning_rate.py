import pytest

from pretrain.optimization.learning_rate import learning_rate_at
from pretrain.settings.optimizer import Schedule


def rates(**schedule):
    schedule = Schedule(num_steps=10, **schedule)
    return [learning_rate_at(step, peak=2.0, schedule=schedule) for step in range(10)]


def test_cosine_rises_linearly_and_falls_to_nearly_zero():
    values = rates(warmup_steps=4)
    assert values[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert values[7] == pytest.approx(1.0)  # half-way down: cos(pi / 2) = 0
    assert values == sorted(values[:4]) + sorted(values[4:], reverse=True)
    assert 0 < values[-1] < 0.2


def test_constant_stays_and_cooldown_falls_linearly():
    assert rates(shape="constant") == [2.0] * 10
    values = rates(shape="constant_with_cooldown", cooldown_steps=4)
    assert values == pytest.approx([2.0] * 7 + [1.5, 1.0, 0.5])


def test_a_schedule_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="do not fit into num_steps=10"):
        rates(warmup_steps=11)
    with pytest.raises(ValueError, match="needs cooldown_steps above 0"):
        rates(shape="constant_with_cooldown")
