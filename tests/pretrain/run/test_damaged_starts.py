"""A start on a run folder with one flipped bit refuses it by name, or gives the same result."""

import logging
import random
import shutil
import traceback
from dataclasses import dataclass, field

import pytest

from data_prep.errors import InputError
from data_prep.storage.sealed import warn_once
from pretrain.checkpoint import find_checkpoint, open_checkpoint, read_model_state
from pretrain.config import PretrainConfig
from pretrain.run.attempts import read_attempts, read_metrics
from tests.support.gloo_processes import run_in_processes
from tests.support.seeds import new_seed
from tests.support.toy_material import write_bad_colors, write_word_tokenizer
from tests.support.toy_run import toy_config, write_toy_dataset

NUM_STEPS = 5
FILES_OF_RUN = {
    "attempts/0001.json",
    "bad_samples/0001.jsonl",
    "checkpoints/step_00000003/checkpoint.json",
    "config.yaml",
    "environment.json",
    "metrics/0001.jsonl",
    "parent.json",
}


@dataclass
class Outcome:
    """End of a start."""

    file: str  # in the run folder
    place: tuple[int, int]  # byte and bit
    refusal: str | None = None
    warnings: str = ""
    failure: str | None = None  # traceback of another error
    different: list[str] = field(default_factory=list)  # from an undamaged start


def config_of(folder, name, **run):
    values = toy_config(folder / "data", folder / name).model_dump(exclude_unset=True)
    del values["streams"]["audio-text"], values["model"]["audio"], values["audio"]
    text = values["model"]["text"]
    text["options"] = {"width": 8, "heads": 2, "layers": 1}
    text["tokenizer"] = str(folder / "tokenizer")
    source = {"name": "bad_colors", "dataset": folder / "data" / "bad_colors"}
    values["streams"]["image-text"] |= {"global_batch_size": 24, "sources": [source]}
    values["loading"] |= {"max_bad_fraction": 1.0, "max_bad_fraction_per_shard": 1.0}
    held_out = {"dataset": folder / "data" / "more_colors", "batch_size": 10}
    values["validation"] = {"every_steps": 2, "streams": {"image-text": held_out}}
    values["schedule"] = {"num_steps": NUM_STEPS, "shape": "constant"}
    values["run"] |= {"checkpoint_every_steps": 1, "keep_checkpoints": 2, "trackers": []} | run
    return PretrainConfig.model_validate(values)


def write_run(folder):
    """Writes a fork of another run, which was stopped after two steps and after three."""
    from pretrain.train import pretrain

    write_bad_colors(folder / "data")
    write_toy_dataset(folder / "data" / "more_colors", "image", shard_sizes=(25,))
    write_word_tokenizer(folder / "tokenizer")
    pretrain(config_of(folder, "parent", stop_after_step=1))
    for last_step in (2, 3):
        pretrain(config_of_fork(folder, last_step))
    (folder / "run").rename(folder / "whole")


def config_of_fork(folder, last_step):
    config = config_of(folder, "run", parent=folder / "parent", stop_after_step=last_step)
    optimizer = config.optimizer.model_copy(update={"learning_rate": 2e-3})
    return config.model_copy(update={"optimizer": optimizer})


def start_on_copies(folder, seed, num_flips):
    """Starts on an undamaged copy of a run folder, then on copies with flipped bits."""
    write_run(folder)
    config = config_of_fork(folder, 4)
    rng = random.Random(seed)
    expected = state_after_start(folder, config, Outcome("none", (0, 0)))
    outcomes = []
    for path in files_in(folder / "whole"):
        for _ in range(num_flips):
            place = rng.randrange(path.stat().st_size), rng.randrange(8)
            outcome = Outcome(str(path.relative_to(folder / "whole")), place)
            state = state_after_start(folder, config, outcome, is_damaged=True)
            if state is not None:
                outcome.different = [key for key in expected if expected[key] != state[key]]
            outcomes.append(outcome)
    return outcomes


def files_in(run):
    """Lists all files except those of the checkpoint before the newest, which is whole."""
    files = (path for path in sorted(run.rglob("*")) if path.is_file())
    return [path for path in files if "step_00000002" not in path.parts]


def state_after_start(folder, config, outcome, *, is_damaged=False):
    """Starts on a copy; returns what the run holds afterwards, or None if it was refused."""
    from pretrain.train import pretrain

    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "whole", run)
    if is_damaged:
        place, bit = outcome.place
        content = bytearray((run / outcome.file).read_bytes())
        content[place] ^= 1 << bit
        (run / outcome.file).write_bytes(content)
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    warn_once.cache_clear()
    state = None
    try:
        pretrain(config)
        state = state_of(run)
    except InputError as error:
        outcome.refusal = str(error)
    except Exception:
        outcome.failure = traceback.format_exc()
    finally:
        logging.getLogger().removeHandler(handler)
    outcome.warnings = "\n".join(messages)
    return state


def state_of(run):
    checkpoint = find_checkpoint(run)
    record = open_checkpoint(str(checkpoint)).record
    rows = [
        {key: row.get(key) for key in ("step", "loss", "data_digest", "validation", "marks")}
        for row in read_metrics(run)
    ]
    return {
        "model": {
            name: value.numpy().tobytes() for name, value in read_model_state(checkpoint).items()
        },
        "state": record.state,
        "parent": record.written_by.get("parent"),
        "rows": rows,
        "attempts": [(each.attempt, each.from_step, each.to_step) for each in read_attempts(run)],
    }


@pytest.mark.parametrize(
    "flips_per_file",
    [pytest.param(3, marks=pytest.mark.slow), pytest.param(40, marks=pytest.mark.exhaustive)],
)
def test_a_flipped_bit_is_named_and_survived_or_refused(tmp_path, flips_per_file):
    [outcomes] = run_in_processes(1, start_on_copies, tmp_path, new_seed(), flips_per_file)
    files = {each.file for each in outcomes}
    assert files >= FILES_OF_RUN
    for each in outcomes:
        print(each)
        assert each.failure is None, each.failure
        is_named = f"{tmp_path / 'run' / each.file}" in f"{each.refusal} {each.warnings}"
        if each.refusal is not None:
            assert is_named
        else:  # Rows and attempts may be missing, but the run itself is the same.
            assert not {"model", "state", "parent"} & set(each.different)
            assert is_named or not each.different
