"""The second half of the runs that are killed at random moments: a file of its own, so that two
workers share them."""

import pytest

from tests.pretrain.test_killed_runs import (
    FIRST_SEED,
    NUM_CASES,
    check_killed_run,
    undisturbed,  # noqa: F401  a fixture
)


@pytest.mark.parametrize("seed", range(FIRST_SEED + NUM_CASES // 2, FIRST_SEED + NUM_CASES))
def test_a_killed_run_ends_as_if_it_had_never_been(undisturbed, tmp_path, seed):  # noqa: F811
    check_killed_run(undisturbed, tmp_path, seed)
