"""The hook that tests of killed runs listen to."""

import subprocess
import sys

from tests.support.killed_runs import MOMENTS, NAMES_OF_MOMENT

LISTEN = """
import sys
from pretrain.moments import EVENT, moment
heard = []
moment("start")
sys.addaudithook(lambda event, values: heard.extend(values) if event == EVENT else None)
moment("step")
moment("update")
print(heard)
"""


def test_a_moment_is_heard_by_who_listens_and_by_nobody_before():
    done = subprocess.run(
        [sys.executable, "-c", LISTEN], check=True, capture_output=True, text=True
    )
    assert done.stdout == "['step', 'update']\n"


def test_every_moment_of_a_kill_is_one_of_a_run():
    named = {name for names in NAMES_OF_MOMENT.values() for name in names}
    assert named == set(MOMENTS) - {"any"}
