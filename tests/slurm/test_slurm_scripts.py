"""Batch scripts without Slurm: stand-ins for its commands record their arguments."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").iterdir())
SAYS = '#!/bin/bash\necho "$(basename "$0") $*" >> "$SAID"\n'


def test_every_script_is_sound():
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", script], check=True)
    # All at once, so that shellcheck knows the files that others source.
    subprocess.run([Path(sys.executable).parent / "shellcheck", "-x", *SCRIPTS], check=True)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Runs a script with stand-ins; returns (finished process, the commands that they recorded)."""
    tools = tmp_path / "tools"
    tools.mkdir()
    said = tmp_path / "said"

    def write(name, content=SAYS):
        (tools / name).write_text(content)
        (tools / name).chmod(0o755)

    for name in ("sbatch", "srun", "scontrol", "python", "sleep"):
        write(name)

    def run(script, *arguments, **environment):
        said.write_text("")
        values = {"PATH": f"{tools}:/usr/bin:/bin", "SAID": said, "ISOPAIR": ROOT}
        values |= {"PYTHON": tools / "python", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": tmp_path}
        values |= {"PREFLIGHT": "0", "SLURM_JOB_NUM_NODES": "3"}
        values = {name: str(value) for name, value in (values | environment).items()}
        finished = subprocess.run(
            ["bash", ROOT / "slurm" / script, *arguments],
            env=values,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        return finished, said.read_text().splitlines()

    run.write = write
    return run


def test_a_part_of_the_array_is_a_part_of_the_data(slurm):
    array = {"SLURM_ARRAY_TASK_ID": 5, "SLURM_ARRAY_TASK_MIN": 2, "SLURM_ARRAY_TASK_COUNT": 8}
    finished, said = slurm("data_prep.sbatch", "x.yaml", "a=1", SLURM_CPUS_PER_TASK=4, **array)
    assert finished.returncode == 0, finished.stderr
    assert said == ["python -m data_prep.make_shards x.yaml a=1 part=3/8 workers=4"]
    _, said = slurm("data_prep.sbatch", "finalize", "x.yaml")
    assert said == ["python -m data_prep.finalize x.yaml"]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [({"SLURM_GPUS_ON_NODE": 8}, 8), ({"SLURM_NTASKS_PER_NODE": 4}, 4), ({}, 1)],
)
def test_training_takes_its_counts_from_slurm(slurm, counts, expected):
    _, said = slurm("pretrain.sbatch", "x.yaml", "seed=1", **counts)
    assert f"srun --ntasks-per-node={expected} --kill-on-bad-exit=1" in said[0]
    assert said[0].endswith("-m pretrain.train x.yaml seed=1")
    assert said[1] == "scontrol show job 7"
    assert len(said) == 2  # the stand-in does not report a running job


@pytest.mark.parametrize(
    ("state", "asked", "is_requeued"),
    [("RUNNING", 0, True), ("RUNNING", 1, False), ("RUNNING", 3, False), ("CANCELLED", 0, False)],
)
def test_a_job_that_still_runs_is_queued_again_if_the_run_may_go_on(
    slurm, state, asked, is_requeued
):
    slurm.write("scontrol", SAYS + f'echo "   JobState={state} Reason=None"\n')
    slurm.write("srun", SAYS + "exit 9\n")
    slurm.write("python", SAYS + f"exit {asked}\n")
    finished, said = slurm("pretrain.sbatch", "x.yaml", "seed=1")
    assert finished.returncode == (0 if asked == 3 else 9)  # 3: the run has finished nevertheless
    assert ("python -m pretrain.requeue x.yaml seed=1" in said) == (state == "RUNNING")
    assert ("scontrol requeue 7" in said) == is_requeued


# srun as it is with a preflight that prints an answer; only "well" is a success.
ANSWER = """\
case "$*" in *pretrain.preflight*) ;; *) exit 0 ;; esac
case "$*" in
    *--exclude*) answer=$AGAIN ;;
    *) answer=$FIRST ;;
esac
[ "$answer" != well ] || exit 0
echo "0: $answer"
exit 1
"""
LEAVE_OUT = "--nodes=2 --exclude=node2"


@pytest.mark.parametrize(("again", "is_trained"), [("well", True), ("", False)])
def test_training_goes_on_without_the_nodes_that_preflight_finds_bad(slurm, again, is_trained):
    slurm.write("srun", SAYS + ANSWER)
    environment = {"PREFLIGHT": 1, "FIRST": LEAVE_OUT, "AGAIN": again}
    finished, said = slurm("pretrain.sbatch", "x.yaml", **environment)
    assert "continuing with srun --nodes=2 --exclude=node2" in finished.stdout
    first, second, *others = said
    assert "-m pretrain.preflight x.yaml" in first
    assert "--exclude" not in first
    assert "--nodes=2 --exclude=node2" in second
    assert finished.returncode == (0 if is_trained else 1)
    trained = [line for line in others if "-m pretrain.train x.yaml" in line]
    assert len(trained) == is_trained
    if is_trained:
        assert "--nodes=2 --exclude=node2" in trained[0]


def test_preflight_is_given_the_options_that_it_printed(slurm):
    prints = 'echo "options: $SRUN_OPTIONS" >> "$SAID"\n'
    slurm.write("srun", SAYS + prints + ANSWER)
    environment = {"PREFLIGHT": 1, "FIRST": LEAVE_OUT, "AGAIN": "well"}
    _, said = slurm("pretrain.sbatch", "x.yaml", **environment)
    assert [line for line in said if line.startswith("options")] == [
        "options: ",
        f"options: {LEAVE_OUT}",
        f"options: {LEAVE_OUT}",
    ]


def test_training_does_not_begin_where_preflight_finds_no_node_to_blame(slurm):
    for behaviour in ("exit 1\n", ANSWER):
        slurm.write("srun", SAYS + behaviour)
        finished, said = slurm("pretrain.sbatch", "x.yaml", PREFLIGHT=1, FIRST="")
        assert finished.returncode == 1
        assert finished.stdout.endswith("not started: see above\n")
        assert len(said) == 1


# Preflight decides by the job's restarts: test_a_signal_while_nodes_are_checked_is_answered.
@pytest.mark.parametrize(("answer", "is_requeued"), [("requeue", True), ("", False)])
def test_a_signal_while_nodes_are_checked_queues_the_job_again(slurm, answer, is_requeued):
    slurm.write("srun", SAYS + ANSWER)
    environment = {"PREFLIGHT": 1, "FIRST": answer}
    finished, said = slurm("pretrain.sbatch", "x.yaml", **environment)
    assert finished.returncode == 1  # a stand-in does not end the script
    assert ("scontrol requeue 7" in said) == is_requeued
    assert not any("pretrain.train" in line for line in said)


def test_evaluation_takes_one_of_several_configs(slurm):
    _, said = slurm("evaluate.sbatch", "a.yaml,b.yaml", "k=v", SLURM_ARRAY_TASK_ID=1)
    assert said[0].endswith("-m eval.evaluate b.yaml k=v")
    _, said = slurm("evaluate.sbatch", "a.yaml", VERB="eval.watch")
    assert said[0].endswith("-m eval.watch a.yaml")


def test_the_pipeline_submits_each_step_after_the_one_before(slurm):
    slurm.write("sbatch", SAYS + 'wc -l < "$SAID"\n')
    arguments = ("--nodes", "4", "--", "d.yaml,f.yaml", "p.yaml", "e.yaml")
    finished, said = slurm("pipeline.sh", *arguments, PARTS=3, CPUS=4)
    assert finished.stdout.splitlines() == [
        "d.yaml: shards 1, finalize 2",
        "f.yaml: shards 3, finalize 4",
        "training 5, evaluation 6",
    ]
    first, cpus = "sbatch --parsable --kill-on-invalid-dep=yes", "--cpus-per-task=4"
    parts = f"{first} {cpus} --array=0-2"
    assert said == [
        f"{parts} slurm/data_prep.sbatch d.yaml",
        f"{first} {cpus} --dependency=afterok:1 slurm/data_prep.sbatch finalize d.yaml",
        f"{parts} slurm/data_prep.sbatch f.yaml",
        f"{first} {cpus} --dependency=afterok:3 slurm/data_prep.sbatch finalize f.yaml",
        f"{first} --nodes 4 --dependency=afterok:2:4 slurm/pretrain.sbatch p.yaml",
        f"{first} --nodes 4 --dependency=afterok:5 slurm/evaluate.sbatch e.yaml",
    ]
