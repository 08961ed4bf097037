import pytest

from data_prep.storage import retry
from data_prep.storage.retry import RetryPolicy


@pytest.fixture
def waited(monkeypatch):
    """The seconds of every pause; nothing waits."""
    seconds = []
    monkeypatch.setattr(retry, "pause", seconds.append)
    return seconds


class Failing:
    """Fails with the given errors, one per call, and then returns the number of calls."""

    def __init__(self, *errors):
        self.errors = errors
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.calls <= len(self.errors):
            raise self.errors[self.calls - 1]
        return self.calls


def is_os_error(error):
    return isinstance(error, OSError)


@pytest.mark.parametrize("num_failures", range(4))
def test_a_call_is_repeated_after_transient_errors_until_it_succeeds(waited, num_failures):
    action = Failing(*[OSError(n) for n in range(num_failures)])
    assert RetryPolicy(3).call(action, is_transient=is_os_error) == num_failures + 1
    assert len(waited) == num_failures


def test_the_error_of_the_last_attempt_is_raised(waited):
    action = Failing(OSError("first"), OSError("second"), OSError("third"))
    with pytest.raises(OSError, match="third"):
        RetryPolicy(2).call(action, is_transient=is_os_error)
    assert action.calls == RetryPolicy(2).num_attempts == 3
    assert len(waited) == 2


def test_a_permanent_error_is_raised_at_once(waited):
    action = Failing(OSError("transient"), ValueError("permanent"))
    with pytest.raises(ValueError, match="permanent"):
        RetryPolicy(5).call(action, is_transient=is_os_error)
    assert (action.calls, len(waited)) == (2, 1)


def test_delays_double_up_to_the_cap(waited):
    policy = RetryPolicy(6, first_delay_seconds=1, max_delay_seconds=10, min_jitter=1)
    policy.call(Failing(*[OSError()] * 6), is_transient=is_os_error)
    assert waited == [1, 2, 4, 8, 10, 10]


def test_jitter_shortens_each_delay_by_at_most_half(waited, monkeypatch):
    draws = iter([0.0, 0.5, 1.0])
    monkeypatch.setattr(retry, "uniform", lambda: next(draws))
    RetryPolicy(3, first_delay_seconds=8, factor=1).call(
        Failing(*[OSError()] * 3), is_transient=is_os_error
    )
    assert waited == [4, 6, 8]


def test_every_retry_is_reported_and_waited_for_as_the_caller_asks(waited):
    reported, waited_for = [], []
    errors = [OSError("a"), OSError("b")]
    RetryPolicy(2, min_jitter=1).call(
        Failing(*errors),
        is_transient=is_os_error,
        on_retry=lambda *values: reported.append(values),
        wait=lambda *values: waited_for.append(values),
    )
    assert reported == waited_for == [(errors[0], 0.5), (errors[1], 1.0)]
    assert waited == []
