"""Seeds of tests that try something else each time."""

import os
import random

VARIABLE = "ISOPAIR_RANDOM_SEED"


def new_seed(number: int = 0) -> int:
    """Returns a new seed and prints it; with the variable set, its value plus `number`."""
    first = os.environ.get(VARIABLE)
    seed = random.SystemRandom().randrange(10**9) if first is None else int(first) + number
    print(f"seed {seed}")
    return seed
