"""A run is watched while it trains, and again after the command was killed."""

import json
import shutil
import threading

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.errors import InputError
from eval.config import WatchConfig
from eval.watch import WatchedRun, dry_run, run
from pretrain.run.attempts import claim_attempt, write_attempt
from pretrain.run.status_file import read_status_file, write_status_file
from pretrain.train import pretrain
from tests.support.toy_run import toy_config
from tests.support.waiting import wait_until


def curve_of(folder, name):
    events = EventAccumulator(str(folder / "tensorboard" / "evaluation")).Reload()
    found = events.Scalars(name)
    values = {event.step: event.value for event in found}
    assert len(values) == len(found)
    return values


def test_every_checkpoint_is_evaluated_as_it_comes(toy_data, tmp_path, capsys):
    folder, output = tmp_path / "run", tmp_path / "out"
    section = {"task": "retrieval", "dataset": str(toy_data / "more_colors")}
    config = WatchConfig.model_validate(
        {
            "checkpoint": folder,
            "output": output,
            "evaluations": {"colors": section},
            "bootstrap_samples": 100,
            "poll_seconds": 0.1,
        }
    )
    with pytest.raises(InputError, match=r"run: expected a run folder .* no config.yaml"):
        run(config)
    settings = {"schedule": {"num_steps": 6, "warmup_steps": 0}}
    settings["run"] = {"checkpoint_every_steps": 2, "keep_checkpoints": 9}
    pretrain(toy_config(toy_data, folder, **settings))
    status = read_status_file(folder)
    write_status_file(folder, status | {"state": "running"})
    last = max((folder / "checkpoints").iterdir())
    moved = shutil.move(last, tmp_path / "later")
    dry_run(config)
    assert "2 checkpoints to evaluate now" in capsys.readouterr().out

    watch = threading.Thread(target=run, args=(config,))
    watch.start()
    found = output / "step_00000004" / "results.json"
    wait_until(lambda: found.exists() or not watch.is_alive())
    assert watch.is_alive()
    shutil.move(moved, last)
    write_status_file(folder, status)
    watch.join(timeout=600)
    assert not watch.is_alive()
    steps = [2, 4, 6]
    records = [
        json.loads((output / f"step_{step:08d}" / "results.json").read_text()) for step in steps
    ]
    assert [record["checkpoint"]["step"] for record in records] == steps
    metric = "text_to_media_mrr"
    values = [record["evaluations"]["colors"]["scores"][metric]["value"] for record in records]
    expected = pytest.approx(dict(zip(steps, values, strict=True)))
    assert curve_of(folder, f"colors/{metric}") == expected
    assert not list(output.rglob("*.npy"))

    # Results are kept; a step whose results were deleted is evaluated again.
    kept = (output / "step_00000002" / "results.json").stat().st_mtime_ns
    shutil.rmtree(output / "step_00000004")
    run(config.model_copy(update={"wait": False}))
    assert (output / "step_00000002" / "results.json").stat().st_mtime_ns == kept
    assert curve_of(folder, f"colors/{metric}") == expected


def test_a_run_has_finished_also_if_its_status_is_damaged(tmp_path, caplog):
    (tmp_path / "config.yaml").write_text("{}\n")
    watched = WatchedRun(tmp_path, tmp_path / "out")
    assert not watched.has_finished()  # no attempt yet
    attempt = claim_attempt(
        tmp_path, world_size=1, strategy="ddp", num_micro_batches=1, hosts=["node1"]
    )
    (tmp_path / "status.json").write_text('{"state": "fin')
    assert not watched.has_finished()
    attempt.outcome = "finished"
    write_attempt(tmp_path, attempt)
    assert watched.has_finished()
    assert f"{tmp_path / 'status.json'}: damaged: expected JSON" in caplog.text
