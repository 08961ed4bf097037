"""Machines and settings of attempts, and what a resumed run derives from them."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch

from pretrain.checkpoints.record import RunState, read_record
from pretrain.run.attempts import claim_attempt, read_attempts, write_attempt
from pretrain.run.computed_on import (
    DEVICE_MEMORY,
    LARGEST_IMAGES,
    LIBRARIES,
    MEMORY_KEYS,
    describe_computation,
    kept_num_micro_batches,
    warn_of_other_rounding,
)
from pretrain.train import pretrain
from pretrain.training.micro_batch_size import MemoryEstimate
from tests.pretrain.run.test_fork import small_config
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_run import toy_config
from tests.support.toy_state import ToyEngine, writer_of

DEVICE = torch.device("cpu")


@pytest.fixture
def config(tmp_path):
    return toy_config(tmp_path, tmp_path / "run", micro_batch_size="auto")


def begin(config, computed_on, *, num_micro_batches=3, saves=None, outcome="did not end"):
    """Writes an attempt, which may save a checkpoint."""
    attempt = claim_attempt(
        config.run.folder,
        world_size=1,
        strategy="ddp",
        num_micro_batches=num_micro_batches,
        hosts=["here"],
        computed_on=computed_on,
    )
    attempt.outcome = outcome
    write_attempt(config.run.folder, attempt)
    if saves is not None:
        writer = writer_of(ToyEngine(), config.run.checkpoints, attempt=attempt.attempt)
        writer.save(RunState(saves, saves))
        writer.finish()
    return attempt


def changed(config, key, value):
    *sections, name = key.split(".")
    section = config
    for each in sections:
        section = getattr(section, each)
    section = section.model_copy(update={name: value})
    return section if not sections else config.model_copy(update={sections[0]: section})


def test_an_attempt_stores_what_affects_rounding_as_text(config):
    found = describe_computation(config, DEVICE)
    assert all(type(value) is str for value in found.values())
    absent = {DEVICE_MEMORY, LARGEST_IMAGES}  # of GPUs, and of runs whose images change their size
    assert found.keys() >= {*LIBRARIES, *MEMORY_KEYS, "processor", "threads"} - absent
    assert found["threads"] == str(torch.get_num_threads())
    assert found["torch"] == torch.__version__.split("+")[0]
    assert (found["device"], found["processes"], found["engine.compile"]) == ("cpu", "1", "False")
    begin(config, found)
    assert read_attempts(config.run.folder)[0].computed_on == found


def test_a_deepspeed_file_is_described_by_its_content(config, tmp_path):
    path = tmp_path / "zero.json"
    described = []
    for content in ("{}", "{}", "{ }"):
        path.write_text(content)
        changed_config = changed(config, "engine.deepspeed_config", path)
        described.append(describe_computation(changed_config, DEVICE)["engine.deepspeed_config"])
    assert described[0] == described[1] != described[2]


def describe_with_threads(config):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    torch.set_num_threads(1 + dist.get_rank())
    return describe_computation(config, DEVICE)


def test_ranks_that_differ_are_all_listed(config):
    first, second = run_in_processes(2, describe_with_threads, config)
    assert first == second
    assert (first["threads"], first["processes"]) == ("1 and 2", "2")
    assert first["torch"] == torch.__version__.split("+")[0]


def test_the_number_of_micro_batches_is_kept_only_if_nothing_of_memory_differs(config, caplog):
    caplog.set_level(logging.INFO)
    computed_on = describe_computation(config, DEVICE)
    assert kept_num_micro_batches(config, computed_on) is None
    begin(config, computed_on)
    assert kept_num_micro_batches(config, computed_on) is None  # nothing is saved
    begin(config, computed_on, saves=4)
    begin(config, computed_on, num_micro_batches=5)  # it saved nothing
    assert kept_num_micro_batches(config, computed_on) == 3
    assert "micro_batch_size auto: 3 micro-batches, as in attempt 0002" in caplog.text
    others = {"threads": "99", "torch": "1.0", "isopair": "other"}
    assert kept_num_micro_batches(config, computed_on | others) == 3
    assert kept_num_micro_batches(changed(config, "micro_batch_size", 7), computed_on) is None
    for key in MEMORY_KEYS:
        caplog.clear()
        assert kept_num_micro_batches(config, computed_on | {key: "other"}) is None, key
        old = computed_on.get(key, "none")
        assert f"attempt 0002, but a new choice: {key} {old!r} then, 'other' now" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loading.batches_ahead", 9),
        ("engine.compile", True),
        ("engine.activation_checkpointing", True),
        ("engine.loss_mode", "strip1"),
        ("engine.strategy", "zero1"),
    ],
)
def test_a_free_setting_of_memory_gives_a_new_choice(config, key, value):
    begin(config, describe_computation(config, DEVICE), saves=4)
    other = changed(config, key, value)
    assert kept_num_micro_batches(other, describe_computation(other, DEVICE)) is None


def test_a_number_that_was_set_by_hand_is_not_kept(config):
    by_hand = changed(config, "micro_batch_size", 4)
    begin(by_hand, describe_computation(by_hand, DEVICE), saves=4)
    assert kept_num_micro_batches(config, describe_computation(config, DEVICE)) is None


@pytest.mark.parametrize("is_newer", [False, True])
def test_a_number_that_ran_out_of_memory_is_not_kept(config, is_newer, caplog):
    caplog.set_level(logging.INFO)
    computed_on = describe_computation(config, DEVICE)
    failed = "failed: OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')"
    begin(config, computed_on, saves=4, outcome="running" if is_newer else failed)
    if is_newer:  # another rank ran out of memory
        lost = begin(config, computed_on, outcome="failed: LostPeerError('step 5')")
        folder = config.run.folder / "failures" / lost.attempt
        folder.mkdir(parents=True)
        (folder / "rank_00001.txt").write_text("now rank 1 on a: OutOfMemoryError: CUDA\n\n...")
    assert kept_num_micro_batches(config, computed_on) is None
    assert "a new choice: the memory did not suffice" in caplog.text
    begin(config, computed_on, num_micro_batches=6, saves=5)
    assert kept_num_micro_batches(config, computed_on) == 6


def test_an_attempt_that_was_killed_keeps_the_number(config):
    computed_on = describe_computation(config, DEVICE)
    begin(config, computed_on, saves=4)
    begin(config, computed_on)
    stacks = config.run.folder / "stacks" / "0002"
    stacks.mkdir(parents=True)
    (stacks / "rank_00000.txt").write_text("rank 0 on here\n")  # reported as possibly out of memory
    assert kept_num_micro_batches(config, computed_on) == 3


def test_attempts_of_earlier_versions_load_and_are_not_compared(config, caplog):
    begin(config, {}, saves=4)
    path = config.run.folder / "attempts" / "0001.json"
    values = json.loads(path.read_text())
    del values["computed_on"], values["sha256"]
    path.write_text(json.dumps(values))
    assert [each.computed_on for each in read_attempts(config.run.folder)] == [{}]
    assert kept_num_micro_batches(config, describe_computation(config, DEVICE)) is None
    warn(config, {"threads": "2"})
    assert caplog.text == ""


def test_a_resumed_run_does_not_choose_anew(toy_data, tmp_path, monkeypatch, caplog):
    for num_micro_batches, step in ((2, 1), (5, 2)):
        monkeypatch.setattr(MemoryEstimate, "num_micro_batches", num_micro_batches)
        run = {"stop_after_step": step}
        pretrain(small_config(toy_data, tmp_path / "run", micro_batch_size="auto", run=run))
    attempts = read_attempts(tmp_path / "run")
    assert [each.num_micro_batches for each in attempts] == [2, 2]
    assert attempts[0].computed_on == attempts[1].computed_on
    assert "computed on something else" not in caplog.text


def warn(config, computed_on, *, num_micro_batches=3):
    attempt = SimpleNamespace(computed_on=computed_on, num_micro_batches=num_micro_batches)
    newest = sorted(config.run.folder.glob("checkpoints/*"))[-1]
    warn_of_other_rounding(config.run.folder, attempt, read_record(newest))


def test_resuming_warns_of_everything_that_affects_rounding(config, caplog):
    computed_on = describe_computation(config, DEVICE)
    begin(config, computed_on, saves=4)
    begin(config, computed_on | {"threads": "77"})  # it saved nothing
    warn(config, computed_on)
    warn(config, computed_on | {"micro_batch_size": "5", "loading.batches_ahead": "9"})
    assert caplog.text == ""
    warn(config, computed_on | {"threads": "99", "torch": "0.1"}, num_micro_batches=4)
    for text in (
        "attempt 0001, which saved step 4, computed on something else: ",
        f"threads '{torch.get_num_threads()}' then, '99' now",
        "'0.1' now",
        "micro-batches '3' then, '4' now; results now agree",
    ):
        assert text in caplog.text
