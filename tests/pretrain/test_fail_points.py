"""Fail points, at which tests of killed runs interrupt a run."""

import subprocess
import sys

from tests.support.killed_runs import MOMENTS, NAMES_OF_MOMENT

SCRIPT = """
import sys
from pretrain.fail_points import EVENT, fail_point
reached = []
fail_point("start")
sys.addaudithook(lambda event, values: reached.extend(values) if event == EVENT else None)
fail_point("step")
fail_point("update")
print(reached)
"""


def test_a_fail_point_reaches_a_hook_once_it_is_installed():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True
    )
    assert done.stdout == "['step', 'update']\n"


def test_every_fail_point_of_a_run_is_a_moment_of_a_kill():
    named = {name for names in NAMES_OF_MOMENT.values() for name in names}
    assert named == set(MOMENTS) - {"any"}
