"""A run that is killed at random moments ends as if it had never been; `make soak` has more."""

import pytest

from tests.support.killed_runs import HOW, MOMENTS, Undisturbed, case_of, check_case, run_case

NUM_CASES = 20
# Most with few processes: to start them takes most of the time.
FEW = {
    (1, "ddp"): 8,
    (2, "ddp"): 3,
    (2, "zero1"): 1,
    (2, "zero2"): 1,
    (2, "zero3"): 1,
    (4, "ddp"): 1,
}
PLACES = [place for place, count in FEW.items() for _ in range(count)]
FIRST_SEED = 5728


def test_the_cases_are_of_every_kind():
    cases = [case_of(FIRST_SEED + number, places=PLACES) for number in range(NUM_CASES)]
    kills = [kill for case in cases for _, _, kill in case.attempts]
    assert {kill.how for kill in kills} == set(HOW)
    assert {kill.moment for kill in kills} == set(MOMENTS)
    assert {case.last for case in cases} == set(FEW)
    assert sum(len(case.attempts) > 1 for case in cases) >= 4
    assert sum(not case.is_steady for case in cases) >= 3


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


def check_killed_run(undisturbed, tmp_path, seed):
    """Runs the case of a seed to its end, and compares it."""
    case = case_of(seed, places=PLACES)
    run_case(case, undisturbed, tmp_path / "run")
    check_case(case, undisturbed, tmp_path / "run")


# Two groups, so that two workers share the file.
SEEDS = [
    pytest.param(FIRST_SEED + n, marks=pytest.mark.xdist_group(f"killed runs {n % 2}"))
    for n in range(NUM_CASES)
]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_run_ends_as_if_it_had_never_been(undisturbed, tmp_path, seed):
    check_killed_run(undisturbed, tmp_path, seed)
