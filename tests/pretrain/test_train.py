"""The three laws, end to end: real processes, real files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_prep.config_file import to_yaml
from data_prep.errors import (
    ConfigError,
    RunError,
)
from pretrain.checkpoint import read_model_state
from pretrain.config import PretrainConfig
from pretrain.run.attempts import read_attempts, read_metrics, read_rows
from tests.support.gloo_processes import WorkerFailedError, run_in_processes
from tests.support.toy_run import toy_config

STEPS = {"num_steps": 20, "warmup_steps": 2}


def train(config):
    from pretrain.train import pretrain

    pretrain(config)


def steps_of(folder):
    return [row for row in read_metrics(folder) if "validation" not in row]


@pytest.fixture(scope="module")
def alone(toy_data, tmp_path_factory):
    """Returns the folder of an undisturbed run of 20 steps by one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    validation = {
        "every_steps": 10,
        "streams": {"image-text": {"dataset": toy_data / "more_colors", "batch_size": 10}},
    }
    run_in_processes(1, train, toy_config(toy_data, folder, schedule=STEPS, validation=validation))
    return folder


def assert_same_run(folder, expected, *, rel=1e-4):
    rows, expected_rows = steps_of(folder), steps_of(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
    for row, truth in zip(rows, expected_rows, strict=True):
        assert row["data_digest"] == truth["data_digest"]
        assert row["loss"] == pytest.approx(truth["loss"], rel=rel)
        assert row["grad_norm"] == pytest.approx(truth["grad_norm"], rel=10 * rel)
        assert row["logit_scale"] == pytest.approx(truth["logit_scale"], rel=rel)
        assert row["logit_bias"] == pytest.approx(truth["logit_bias"], rel=rel)


def test_a_run_writes_what_it_is_and_what_it_did(alone):
    assert (alone / "config.yaml").exists()
    environment = json.loads((alone / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert set(environment["dataset_fingerprints"]) == {
        "image-text/colors",
        "image-text/more_colors",
        "audio-text/tones",
        "mixing/image-text",
        "draws",
        "validation/image-text",
    }
    [attempt] = read_attempts(alone)
    assert (attempt.from_step, attempt.to_step, attempt.outcome) == (0, 20, "finished")
    assert json.loads((alone / "status.json").read_text())["state"] == "finished"
    rows = steps_of(alone)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["samples_seen"] == 20 * 24
    assert rows[-1]["total_loss"] < rows[0]["total_loss"]
    assert list((alone / "tensorboard").rglob("events.out.tfevents.*"))
    validations = [row["validation"] for row in read_metrics(alone) if "validation" in row]
    assert len(validations) == 2
    assert 0 <= validations[0]["image-text/image-text"]["image_to_text_recall@1"] <= 1


@pytest.mark.parametrize(
    ("num_processes", "changes"),
    [
        (2, {}),
        pytest.param(3, {"micro_batch_size": 1}, marks=pytest.mark.slow),
        pytest.param(2, {"micro_batch_size": 3}, marks=pytest.mark.slow),
        (1, {"loading": {"num_workers": 2}}),
    ],
    ids=["2 processes", "3 processes, empty micro-batches", "micro-batches", "loader workers"],
)
def test_a_run_does_not_depend_on_what_it_ran_on(toy_data, tmp_path, alone, num_processes, changes):
    config = toy_config(toy_data, tmp_path / "run", schedule=STEPS)
    loading = config.loading.model_copy(update=changes.get("loading", {}))
    config = config.model_copy(update=changes | {"loading": loading})
    run_in_processes(num_processes, train, config)
    assert_same_run(tmp_path / "run", alone)


def test_a_stopped_run_resumed_elsewhere_ends_as_if_it_had_never_stopped(toy_data, tmp_path, alone):
    config = toy_config(toy_data, tmp_path / "run", schedule=STEPS)
    stopping = config.run.model_copy(update={"stop_after_step": 7})
    run_in_processes(2, train, config.model_copy(update={"run": stopping}))
    assert len(steps_of(tmp_path / "run")) == 7
    run_in_processes(1, train, config)
    assert_same_run(tmp_path / "run", alone)
    attempts = read_attempts(tmp_path / "run")
    assert [(each.world_size, each.from_step) for each in attempts] == [(2, 0), (1, 7)]
    # Beyond the metrics: the parameters. Adam turns the rounding noise of parameters whose true
    # gradient is zero (key biases) into steps of the learning rate, so the bound is a share of it.
    final = "checkpoints/step_00000020"
    resumed = read_model_state(tmp_path / "run" / final)
    undisturbed = read_model_state(alone / final)
    for name, value in undisturbed.items():
        if not name.endswith("in_proj_bias"):
            torch.testing.assert_close(resumed[name], value, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.exhaustive
def test_resuming_in_one_process_is_bit_exact(toy_data, tmp_path, alone):
    config = toy_config(toy_data, tmp_path / "again", schedule=STEPS)
    stopping = config.run.model_copy(update={"stop_after_step": 11})
    run_in_processes(1, train, config.model_copy(update={"run": stopping}))
    run_in_processes(1, train, config)
    final = "checkpoints/step_00000020"
    resumed = read_model_state(tmp_path / "again" / final)
    undisturbed = read_model_state(alone / final)
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)


def test_a_damaged_newest_checkpoint_is_passed_over(toy_data, tmp_path, alone):
    config = toy_config(toy_data, tmp_path / "run", schedule=STEPS)
    for last_step in (5, 9):
        stopping = config.run.model_copy(update={"stop_after_step": last_step})
        run_in_processes(1, train, config.model_copy(update={"run": stopping}))
    newest = tmp_path / "run/checkpoints/step_00000009/model-00001-of-00001.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    run_in_processes(1, train, config)
    assert read_attempts(tmp_path / "run")[-1].from_step == 5
    assert_same_run(tmp_path / "run", alone)


def test_another_config_in_the_same_folder_is_refused_with_the_keys_that_differ(
    toy_data, tmp_path, alone
):
    shutil.copytree(alone, tmp_path / "run")
    config = toy_config(
        toy_data, tmp_path / "run", schedule=STEPS, optimizer={"learning_rate": 2e-3}
    )
    with pytest.raises(
        WorkerFailedError, match=r"optimizer\.learning_rate: 0\.001 in the run folder, 0\.002"
    ):
        run_in_processes(2, train, config)


def test_a_non_finite_loss_stops_the_run_naming_the_step(toy_data, tmp_path):
    config = toy_config(
        toy_data,
        tmp_path / "run",
        optimizer={"learning_rate": 1e30, "gradient_clipping": None},
        schedule={"num_steps": 9, "warmup_steps": 0},
    )
    with pytest.raises(
        WorkerFailedError, match=r"DivergedError: step \d+: .*(nan|inf).* not applied"
    ):
        run_in_processes(1, train, config)
    [attempt] = read_attempts(tmp_path / "run")
    assert attempt.outcome.startswith("failed: DivergedError")


def copy_with_bad_bytes(toy_data, folder, *, num_bad):
    """Copies the toy data, with a flipped bit in `num_bad` images of the first source."""
    from data_prep.shards.index import (
        BLOCK_BYTES,
        ShardIndex,
    )

    shutil.copytree(toy_data, folder)
    index = ShardIndex.read(folder / "colors" / "00000000.idx")
    column = index.fields.index("png")
    tar = folder / "colors" / "00000000.tar"
    content = bytearray(tar.read_bytes())
    for place in range(num_bad):
        content[int(index.table[place, column, 0]) * BLOCK_BYTES + 20] ^= 1
    tar.write_bytes(content)
    return folder


def test_bad_bytes_are_substituted_the_same_way_anywhere_and_entered_in_the_ledger(
    toy_data, tmp_path
):
    data = copy_with_bad_bytes(toy_data, tmp_path / "data", num_bad=2)
    for num_processes in (1, 2):
        config = toy_config(
            data,
            tmp_path / f"run{num_processes}",
            schedule=STEPS,
            loading={"max_bad_fraction": 0.1, "max_bad_fraction_per_shard": 0.1},
        )
        run_in_processes(num_processes, train, config)
    assert_same_run(tmp_path / "run2", tmp_path / "run1")
    ledgers = [
        {(r["step"], r["ordinal"], r["substitute"]) for r in read_rows(path)}
        for path in sorted(tmp_path.glob("run?/bad_samples/0001.jsonl"))
    ]
    assert ledgers[0] == ledgers[1]
    assert {ordinal for _, ordinal, _ in ledgers[0]} == {0, 1}
    assert len({(ordinal, substitute) for _, ordinal, substitute in ledgers[0]}) == 2


def test_too_many_bad_samples_of_all_or_of_a_shard_stop_the_run(toy_data, tmp_path):
    data = copy_with_bad_bytes(toy_data, tmp_path / "data", num_bad=5)
    config = toy_config(data, tmp_path / "run", schedule=STEPS)
    with pytest.raises(WorkerFailedError, match=r"RunError: 2 of 158 samples are unreadable"):
        run_in_processes(1, train, config)
    loading = {"max_bad_fraction": 0.1, "max_bad_fraction_per_shard": 0.05}
    config = toy_config(data, tmp_path / "run2", schedule=STEPS, loading=loading)
    expected = r"RunError: 3 of the 40 samples in shard 00000000 of image-text/colors .*unreadable"
    with pytest.raises(WorkerFailedError, match=expected):
        run_in_processes(2, train, config)
    # A third attempt knows what the ledger of the second holds: the next one is one too many.
    with pytest.raises(WorkerFailedError, match=r"RunError: [34] of the 40 samples in shard"):
        run_in_processes(1, train, config)


def test_every_epoch_is_accounted_for_also_by_an_attempt_that_begins_within_it(
    toy_data, tmp_path, alone
):
    data = copy_with_bad_bytes(toy_data, tmp_path / "data", num_bad=1)
    config = toy_config(data, tmp_path / "run", schedule=STEPS, loading={"num_workers": 1})
    stopping = config.run.model_copy(update={"stop_after_step": 9})
    run_in_processes(2, train, config.model_copy(update={"run": stopping}))
    run_in_processes(1, train, config)
    reports = [report for row in steps_of(tmp_path / "run") for report in row["ended_epochs"]]
    ended = {(report["source"], report["epoch"]): report for report in reports}
    assert set(ended) == {
        (report["source"], report["epoch"])
        for row in steps_of(alone)
        for report in row["ended_epochs"]
    }
    for report in reports:
        parts = ("read", "substituted", "read_before", "left_over")
        assert sum(report[part] for part in parts) == report["in_manifest"]
    assert ended["image-text/colors", 0]["in_manifest"] == 83
    assert ended["image-text/colors", 0]["left_over"] == 3
    assert sum(report["substituted"] for report in reports) in (1, 2)
    assert max(report["read_before"] for report in reports) > 0
    seen = steps_of(tmp_path / "run")[-1]["epochs_seen"]
    assert seen["audio-text"]["tones"] == 20 * 8 / 50


def test_an_epoch_that_is_not_read_whole_stops_the_run(toy_data, tmp_path):
    from pretrain.data.stream_reader import StreamReader

    def fill_all_but_count_one_less(self, buffers, samples, rows, real=StreamReader.fill):
        bad_samples, num_read = real(self, buffers, samples, rows)
        num_read["tones", 0] -= 1 if num_read["tones", 0] else 0
        return bad_samples, num_read

    config = toy_config(toy_data, tmp_path / "run", schedule=STEPS)
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(RunError, match=r"epoch 0 of audio-text/tones ended with \d+ samples"),
    ):
        patch.setattr(StreamReader, "fill", fill_all_but_count_one_less)
        train(config)


def test_substituted_shards_mark_everything_that_comes_of_them(toy_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(toy_data, data)
    (data / "tones" / "00000001.tar").unlink()
    config = toy_config(data, tmp_path / "stopped", schedule=STEPS)
    with pytest.raises(WorkerFailedError, match=r"tones/00000001\.tar: expected a shard of"):
        run_in_processes(1, train, config)
    config = toy_config(
        data, tmp_path / "run", schedule=STEPS, loading={"on_bad_shard": "substitute"}
    )
    stopping = config.run.model_copy(update={"stop_after_step": 10})
    run_in_processes(2, train, config.model_copy(update={"run": stopping}))
    run_in_processes(1, train, config)
    tags = ["substituted_shards"]
    assert [each.tags for each in read_attempts(tmp_path / "run")] == [tags] * 2
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000020" / "checkpoint.json"
    assert json.loads(checkpoint.read_text())["marks"] == tags
    assert steps_of(tmp_path / "run")[-1]["marks"] == tags
    [report] = [
        report
        for row in steps_of(tmp_path / "run")
        for report in row["ended_epochs"]
        if (report["source"], report["epoch"]) == ("audio-text/tones", 0)
    ]
    assert 18 <= report["substituted"] <= 20


def test_segments_that_no_step_has_used_may_change_and_others_may_not(toy_data, tmp_path):
    def with_segments(*segments, last_step):
        values = toy_config(toy_data, tmp_path / "run", schedule=STEPS).model_dump()
        values["streams"]["image-text"]["segments"] = list(segments)
        values["run"]["stop_after_step"] = last_step
        values["run"]["checkpoint_folder"] = str(tmp_path / "elsewhere")
        return PretrainConfig.model_validate(values)

    colors = {"name": "colors", "dataset": toy_data / "colors"}
    early, late = ({"from_step": step, "sources": [colors]} for step in (3, 6))
    train(with_segments(early, last_step=6))
    train(with_segments(early, late, last_step=8))
    with pytest.raises(ConfigError, match=r"streams\.image-text\.segments"):
        train(with_segments(late, last_step=9))
    with pytest.raises(
        ConfigError, match=r"segments\.1\.from_step: 6 in the run folder, 7 in this config"
    ):
        train(with_segments(early, late | {"from_step": 7}, last_step=9))


@pytest.mark.exhaustive
def test_one_stream_per_step_is_the_same_run_on_any_number_of_processes(toy_data, tmp_path):
    """Checks that towers not used in a step have a zero gradient in every process."""
    runs = {1: {}, 2: {"micro_batch_size": 3}, 3: {"micro_batch_size": 1}}
    for num_processes, changes in runs.items():
        config = toy_config(
            toy_data,
            tmp_path / f"run{num_processes}",
            schedule=STEPS,
            streams_per_step="one",
            loading={"num_workers": 2},
            **changes,
        )
        run_in_processes(num_processes, train, config)
    rows = steps_of(tmp_path / "run1")
    assert [list(row["loss"]) for row in rows[:4]] == [
        ["audio-text/audio-text"],
        ["image-text/image-text"],
    ] * 2
    assert rows[-1]["samples_seen"] == 10 * 16 + 10 * 8
    assert_same_run(tmp_path / "run2", tmp_path / "run1")
    assert_same_run(tmp_path / "run3", tmp_path / "run1")


def test_bfloat16_trains_close_to_float32(toy_data, tmp_path, alone):
    config = toy_config(
        toy_data, tmp_path / "run", schedule=STEPS, engine={"precision": "bf16", "device": "cpu"}
    )
    run_in_processes(2, train, config)
    for row, truth in zip(steps_of(tmp_path / "run"), steps_of(alone), strict=True):
        assert row["data_digest"] == truth["data_digest"]
        assert row["total_loss"] == pytest.approx(truth["total_loss"], rel=0.05)
        assert row["total_loss"] != pytest.approx(truth["total_loss"], rel=1e-5)


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2"],
    "accelerate launch": [
        "accelerate.commands.launch",
        "--config_file",
        str(Path(__file__).parents[2] / "configs" / "accelerate" / "two_processes.yaml"),
    ],
}


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate launch"])
@pytest.mark.slow
def test_the_command_gives_the_same_run_under_every_launcher(toy_data, tmp_path, alone, launcher):
    """Uses the launchers themselves; the other tests use the quicker fork server."""
    config = toy_config(toy_data, tmp_path / "run", schedule=STEPS)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "pretrain.train"]
    done = subprocess.run(
        [*command, str(tmp_path / "config.yaml")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", alone)
    [attempt] = read_attempts(tmp_path / "run")
    assert attempt.world_size == 2
