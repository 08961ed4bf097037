"""Batch scripts on a real Slurm while nodes and jobs fail.

Whatever happens to a job, its run ends with the same sample ids of every step, and the same
parameters, as an undisturbed run.
"""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data_prep.config_file import read_config
from pretrain.config import PretrainConfig
from pretrain.run.attempts import read_attempts, read_metrics
from tests.slurm.slurm_cluster import SCRATCH, SlurmCluster
from tests.support.killed_runs import final_state, first_state, travelled_share

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "configs" / "pretrain" / "demo.yaml"
NUM_STEPS = 60
SETTINGS = {
    "run.log_every_steps": 1,
    "run.checkpoint_every_steps": 10,
    "schedule.num_steps": NUM_STEPS,
    "schedule.warmup_steps": 5,
    "validation.every_steps": 30,
    "engine.timeout_seconds": 40,
}
SECONDS_TO_START = 180  # until a step has finished, also after a requeue
SECONDS_TO_END = 600
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE")


@pytest.fixture(scope="session")
def cluster():
    """Starts four nodes of four CPUs."""
    cluster = SlurmCluster()
    cluster.start(4)
    yield cluster
    cluster.stop()


@pytest.fixture
def run_of(cluster, tmp_path):
    """Starts runs of the demo's model with slurm/pretrain.sbatch."""
    return lambda name="run", **changes: Run(cluster, tmp_path / name, changes)


@pytest.fixture(scope="session")
def whole(cluster, tmp_path_factory):
    """Runs an undisturbed run on two nodes."""
    run = Run(cluster, tmp_path_factory.mktemp("whole") / "run", {})
    run.submit(nodes=2)
    run.wait_for_end()
    assert [each.outcome for each in run.attempts] == ["finished"]
    return run


class Run:
    """A run and its current job."""

    def __init__(self, cluster, folder, changes):
        self.cluster, self.folder, self.job = cluster, folder, None
        self.settings = SETTINGS | {"run.folder": folder} | changes

    def submit(self, *options, nodes, preflight=0):
        log = self.folder.parent / "%j.log"
        exports = f"ALL,PREFLIGHT={preflight},PYTHON={sys.executable}"
        self.job = self.cluster.ask(
            *("sbatch", "--parsable", "--nodes", nodes, "--output", log, "--export", exports),
            *(*options, "slurm/pretrain.sbatch", DEMO),
            *(f"{key}={value}" for key, value in self.settings.items()),
            cwd=ROOT,
        ).strip()

    @property
    def attempts(self):
        return read_attempts(self.folder)

    @property
    def log(self):
        return (self.folder.parent / f"{self.job}.log").read_text(errors="replace")

    def wait_for_step(self, step, *, attempt=1):
        """Waits until an attempt has finished a step."""
        path = self.folder / "status.json"

        def is_done():
            status = json.loads(path.read_text()) if path.exists() else {"attempt": 0}
            return int(status["attempt"]) >= attempt and status["step"] >= step

        self.cluster.wait_until(is_done, seconds=SECONDS_TO_START)

    def wait_for_end(self, state="COMPLETED"):
        """Waits until the job is over; just before a requeue it seems to be for a moment."""
        end = time.monotonic() + SECONDS_TO_END
        times_seen = 0
        while times_seen < 5:
            assert time.monotonic() < end, f"the job goes on\n{self.log}"
            found = self.cluster.job(self.job)
            times_seen = times_seen + 1 if found["JobState"] in OVER else 0
            time.sleep(0.5)
        assert found["JobState"] == state, f"{found['JobState']} ({found['Reason']})\n{self.log}"

    def restarts(self):
        return int(self.cluster.job(self.job)["Restarts"])

    def status(self):
        """Returns the output of pretrain.status."""
        command = [sys.executable, "-m", "pretrain.status", self.folder]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def digests(self):
        """Returns the digest of the sample ids of every step."""
        rows = [row for row in read_metrics(self.folder) if "validation" not in row]
        return {row["step"]: row["data_digest"] for row in rows}

    def check(self, whole, *, same_bits=True):
        """Checks that the run has finished with the results of the undisturbed run."""
        assert self.attempts[-1].outcome == "finished"
        assert sorted(self.digests()) == list(range(1, NUM_STEPS + 1))
        assert self.digests() == whole.digests()
        state, expected = (final_state(each.folder, NUM_STEPS) for each in (self, whole))
        if same_bits:
            different = [name for name in expected if not torch.equal(state[name], expected[name])]
            assert not different
        first = first_state(read_config(PretrainConfig, whole.folder / "config.yaml"))
        assert travelled_share(state, expected, first=first) < 0.01


def a_step(name):
    """Chooses a step for a test by its name."""
    return random.Random(name).randint(6, 40)


# ------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("script", ["pretrain", "evaluate", "data_prep"])
def test_slurm_accepts_the_scripts(cluster, script):
    command = ["sbatch", "--test-only", "--nodes=1", "--cpus-per-task=2"]
    finished = subprocess.run(
        [*command, f"slurm/{script}.sbatch", "x.yaml"],
        cwd=ROOT,
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "to start at" in finished.stderr


# ------------------------------------------------------------------------------------- signals


def test_a_preempted_job_saves_and_goes_on(run_of, cluster, whole):
    run = run_of()
    run.submit("--partition=low", "--signal=USR2@300", nodes=2)
    run.wait_for_step(a_step("preempted"))
    cluster.ask("sbatch", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    run.wait_for_end()
    run.check(whole)
    first, _ = run.attempts
    assert (first.outcome, first.stop_cause) == ("stopped", "SIGUSR2")
    assert "stopped by SIGUSR2" in run.status()
    assert f"job {run.job} restarted 1 times" in run.status()


def test_a_job_at_its_time_limit_saves_and_goes_on(run_of, cluster, whole):
    run = run_of(**{"engine.timeout_seconds": 200})
    run.submit("--time=2", "--signal=USR2@30", nodes=2)
    run.wait_for_step(a_step("time limit"))
    # Time limits are whole minutes: the run is paused until the signal, which wakes it.
    _, other = cluster.nodes_of(run.job)
    cluster.run_on(other, "pkill", "-STOP", "^python")
    cluster.wait_until(lambda: run.attempts[0].outcome == "stopped", seconds=120)
    run.wait_for_end()
    run.check(whole)
    assert [each.stop_cause for each in run.attempts[:-1]].count("SIGUSR2") >= 1
    assert run.restarts() >= 1


def test_a_cancelled_run_goes_on_with_a_number_of_nodes_that_does_not_divide_the_lanes(
    run_of, cluster, whole
):
    run = run_of()
    run.submit(nodes=4)
    run.wait_for_step(a_step("cancelled"))
    cluster.ask("scancel", run.job)
    run.wait_for_end("CANCELLED")
    [first] = run.attempts
    assert (first.outcome, first.stop_cause, first.world_size) == ("stopped", "SIGTERM", 4)
    assert run.restarts() == 0
    run.submit(nodes=3)
    run.wait_for_end()
    assert [each.world_size for each in run.attempts] == [4, 3]
    run.check(whole, same_bits=False)


# -------------------------------------------------------------------------------------- faults


def test_a_job_whose_rank_is_killed_ends_at_once_and_goes_on(run_of, cluster, whole):
    run = run_of()
    run.submit(nodes=2)
    run.wait_for_step(a_step("killed"))
    _, other = cluster.nodes_of(run.job)
    cluster.run_on(other, "pkill", "-KILL", "-o", "-f", "pretrain.train")
    run.wait_for_end()
    run.check(whole)
    assert run.restarts() == 1
    assert f"rank 1 on {other}: exited without a traceback" in run.status()
    assert f"rank 1 on {other}: exited without a traceback" in run.log


@pytest.mark.parametrize(
    ("fault", "repair", "is_batch_host"),
    [
        ("crash", "boot", False),
        ("crash", "boot", True),
        ("unplug", "plug", False),
        ("freeze", "thaw", False),
        ("kill_slurmd", "start_slurmd", False),
    ],
)
def test_a_job_that_loses_a_node_goes_on_on_another(
    run_of, cluster, whole, fault, repair, is_batch_host
):
    run = run_of()
    run.submit(nodes=2)
    run.wait_for_step(a_step(fault))
    lost = cluster.nodes_of(run.job)[0 if is_batch_host else 1]
    getattr(cluster, fault)(lost)
    if fault == "kill_slurmd":  # its ranks keep running: the run must not end before Slurm notices
        cluster.run_on(cluster.nodes_of(run.job)[0], "pkill", "-STOP", "^python")
    try:
        run.wait_for_step(1, attempt=2)
        assert lost not in run.attempts[1].hosts
    finally:
        getattr(cluster, repair)(lost)  # while the new attempt runs, a stray rank wakes up
    run.wait_for_end()
    cluster.wait_until(lambda: lost in cluster.nodes_up(), seconds=60)
    run.check(whole)
    assert run.restarts() == 1
    assert len(run.attempts) == 2
    assert f"{lost} is " in run.status()  # DOWN or another state


def test_a_run_whose_disk_is_full_goes_on_when_there_is_room(run_of, whole):
    store = SCRATCH / "checkpoints"
    run = run_of(**{"run.checkpoint_folder": store, "run.max_failed_saves": 1})
    run.submit(nodes=2)
    run.wait_for_step(12)
    ballast = SCRATCH / "ballast"
    with ballast.open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 20))
                file.flush()
        except OSError:
            pass
    run.cluster.wait_until(lambda: run.attempts[0].outcome != "running", seconds=SECONDS_TO_START)
    ballast.unlink()
    run.wait_for_end()
    assert "No space left on device" in run.attempts[0].outcome
    assert "No space left on device" in run.status()
    (run.folder / "checkpoints").symlink_to(store)
    run.check(whole)
    assert run.restarts() >= 1


def test_a_run_that_diverges_is_not_queued_again(run_of):
    run = run_of(**{"optimizer.learning_rate": 1e30, "schedule.warmup_steps": 0})
    run.submit(nodes=2)
    run.wait_for_end("FAILED")
    [attempt] = run.attempts
    assert "DivergedError" in attempt.outcome
    assert run.restarts() == 0
    assert "not requeued: the run cannot continue without a change" in run.log


def test_preflight_leaves_out_a_node_that_does_not_see_the_data(run_of, cluster, whole):
    run = run_of()
    hidden = ROOT / "demo" / "datasets" / "sounds_train"
    cluster.run_on("node2", "mount", "-t", "tmpfs", "tmpfs", hidden)
    try:
        run.submit("--nodelist=node1,node2,node3", nodes=3, preflight=1)
        run.wait_for_end()
    finally:
        cluster.run_on("node2", "umount", hidden)
    assert f"node2: {hidden.relative_to(ROOT)}/dataset.json: No such file" in run.log
    assert "continuing with srun --nodes=2 --exclude=node2" in run.log
    [attempt] = run.attempts
    assert attempt.hosts == ["node1", "node3"]
    run.check(whole)


# ------------------------------------------------------------------------------- the pipeline


def test_the_whole_pipeline_comes_to_the_figures_of_the_demo(cluster, tmp_path):
    datasets = tmp_path / "datasets"
    preparations = []
    for data in ("digits", "scenes", "sounds", "objects"):
        for split in ("train", "validation", "test"):
            text = (ROOT / "configs" / "data_prep" / f"demo_{data}.yaml").read_text()
            text = text.replace(f"{data}/train.tsv", f"{data}/{split}.tsv")
            text = text.replace(f"demo/datasets/{data}_train", f"{datasets}/{data}_{split}")
            preparations.append(tmp_path / f"{data}_{split}.yaml")
            preparations[-1].write_text(text)
    configs = [",".join(map(str, preparations))]
    for kind in ("pretrain", "eval"):
        text = (ROOT / "configs" / kind / "demo.yaml").read_text()
        for name in ("datasets", "run", "results"):
            text = text.replace(f"demo/{name}", str(tmp_path / name))
        configs.append(str(tmp_path / f"{kind}.yaml"))
        Path(configs[-1]).write_text(text)
    settings = {"PARTS": "2", "PREFLIGHT": "1", "PYTHON": sys.executable}
    settings |= {"SBATCH_OUTPUT": str(tmp_path / "%x-%A_%a.log"), "CPUS": "2"}
    output = subprocess.run(
        ["slurm/pipeline.sh", "--nodes", "2", "--", *configs],
        cwd=ROOT,
        env=cluster.environment | settings,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    last = output.rpartition(" ")[2].strip()
    cluster.wait_until(lambda: cluster.job(last)["JobState"] in OVER, seconds=1200)
    assert cluster.job(last)["JobState"] == "COMPLETED"
    found, expected = (
        json.loads((folder / "results" / "results.json").read_text())["evaluations"]
        for folder in (tmp_path, ROOT / "demo")
    )
    assert {name: each["scores"] for name, each in found.items()} == {
        name: each["scores"] for name, each in expected.items()
    }
