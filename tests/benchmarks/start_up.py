"""CPU time of --help and of `import pretrain.checkpoint`, as ratios to what they must load.

    python -m tests.benchmarks.start_up

`--help` is divided by `import pydantic, yaml`, the import of a checkpoint by `import torch`. Each
value is the minimum of several runs, taken in turns.
"""

import resource
import subprocess
import sys

from tests.support.commands import COMMANDS

ROUNDS = 5


def cpu_seconds(*arguments):
    """User and system time of one run of the interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def least(*commands):
    """Least CPU seconds of each command, measured in turns."""
    rounds = [[cpu_seconds(*command) for command in commands] for _ in range(ROUNDS)]
    return [min(column) for column in zip(*rounds, strict=True)]


def main():
    base, *helps = least(
        ("-c", "import pydantic, yaml"), *(("-m", name, "--help") for name in COMMANDS)
    )
    print(f"import pydantic, yaml: {base:.2f} s")
    for name, seconds in zip(COMMANDS, helps, strict=True):
        print(f"{name} --help: {seconds / base:.1f} times")
    torch, checkpoint = least(("-c", "import torch"), ("-c", "import pretrain.checkpoint"))
    print(
        f"import torch: {torch:.2f} s; import pretrain.checkpoint: {checkpoint / torch:.2f} times"
    )


if __name__ == "__main__":
    main()
