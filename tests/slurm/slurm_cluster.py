"""Real Slurm cluster on one Debian machine, whose nodes can be made to fail; needs root.

    python tests/slurm/slurm_cluster.py start 3
    export SLURM_CONF=/run/isopair-slurm/slurm.conf
    python tests/slurm/slurm_cluster.py crash node2    boot, unplug, plug, freeze, thaw, ...
    python tests/slurm/slurm_cluster.py stop

A node is a set of Linux namespaces (network, processes, mounts, host name, IPC) with its own
slurmd. Nodes reach one another and this machine through veth pairs; they have no default route. The
file system is shared, as with NFS, but each node has its own /dev/shm. There are two partitions,
main and low; main preempts low. Times are shortened: a node that is silent for 10 s is down. A
killed job gets 5 s to end, a preempted one 15 s, and a requeued one waits for 15 s.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path("/run/isopair-slurm")
SCRATCH, SCRATCH_MB = FOLDER / "scratch", 256  # a small disk that all nodes share
NAME = "isopair"  # of interfaces and namespaces: NAME-n1, ...
FREEZER = Path("/sys/fs/cgroup/freezer")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2", "util-linux", "procps")
COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare", "sysctl")
SECONDS_TO_START = 60
UP = re.compile(r"idle|mixed|allocated|completing|planned|reserved")

CONFIG = """\
ClusterName={name}
SlurmctldHost={host}({net}.1)
CommunicationParameters=NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=15
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MinJobAge=86400
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=30
KillWait=5
JobRequeue=1
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF DefaultTime=30 State=UP
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=15 DefaultTime=30 State=UP
"""

# Process 1 of a node. It reads its pid on the host before it mounts the node's own /proc.
NODE = """\
set -e
read -r pid _ < /proc/self/stat
mount -t proc proc /proc
hostname "$1"
if [ {proctrack} = cgroup ]; then
    umount {freezer}
    mount -t cgroup -o freezer cgroup {freezer}
fi
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/nsswitch.conf /etc/nsswitch.conf
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
[ ! -d /etc/slurm ] || mount --bind {folder} /etc/slurm
export SLURM_CONF={folder}/slurm.conf
cd /
slurmd -N "$1"
echo "$pid" > "{folder}/$1.new"
mv "{folder}/$1.new" "{folder}/$1.pid"
set +e
while :; do sleep 3600 & wait; done
"""


class SlurmCluster:
    """Starts, breaks and queries a cluster, whose whole state is in FOLDER."""

    def __init__(self):
        self.environment = os.environ | {"SLURM_CONF": str(FOLDER / "slurm.conf")}
        for name in [name for name in self.environment if name.startswith(("SLURM_JOB", "SBATCH"))]:
            del self.environment[name]

    # ------------------------------------------------------------------------- start and stop

    def start(self, num_nodes, *, cpus=4):
        """Installs missing packages, ends an earlier cluster, and waits for all nodes."""
        if os.geteuid() != 0:
            raise SystemExit("only root can make nodes (network namespaces, mounts, daemons)")
        _install()
        self.stop()
        for name in ("state", "spool", "munge", "log", "scratch"):
            (FOLDER / name).mkdir(parents=True)
            (FOLDER / name).chmod(0o755)
        _run("mount", "-t", "tmpfs", "-o", f"size={SCRATCH_MB}m", "tmpfs", SCRATCH)
        net = _free_net()
        (FOLDER / "net").write_text(net)
        _run("ip", "addr", "add", f"{net}.1/32", "dev", "lo")
        _run("ip", "route", "add", "blackhole", f"{net}.0/24")
        self._write_files(num_nodes, cpus, net)
        self._start_daemons()
        for node in self.nodes():
            self._wire(node)
            self.boot(node)
        self.wait_until(lambda: self.nodes_up() == self.nodes(), seconds=SECONDS_TO_START)

    def _write_files(self, num_nodes, cpus, net):
        proctrack = "cgroup" if (FREEZER / "cgroup.procs").exists() else "linuxproc"
        host = socket.gethostname()
        numbers = range(1, num_nodes + 1)
        nodes = "\n".join(
            f"NodeName=node{n} NodeAddr={net}.{10 + n} CPUs={cpus} RealMemory=8000" for n in numbers
        )
        values = {"name": NAME, "host": host, "net": net, "folder": FOLDER, "nodes": nodes}
        values |= {"proctrack": proctrack, "freezer": FREEZER}
        (FOLDER / "slurm.conf").write_text(CONFIG.format(**values))
        cgroups = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nCgroupMountpoint=/sys/fs/cgroup\n"
        (FOLDER / "cgroup.conf").write_text(cgroups)
        (FOLDER / "node.sh").write_text(NODE.format(**values))
        addresses = "".join(f"{net}.{10 + n} node{n}\n" for n in numbers)
        (FOLDER / "hosts").write_text(f"127.0.0.1 localhost\n{net}.1 {host}\n{addresses}")
        # Host names are resolved from that file only.
        switch = Path("/etc/nsswitch.conf").read_text()
        (FOLDER / "nsswitch.conf").write_text(re.sub("(?m)^hosts:.*", "hosts: files", switch))

    def _start_daemons(self):
        key = FOLDER / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = {"key-file": key, "socket": FOLDER / "munge" / "socket"}
        files |= {"pid-file": FOLDER / "munged.pid", "seed-file": FOLDER / "munge" / "seed"}
        files |= {"log-file": FOLDER / "log" / "munged.log"}
        _run("munged", "--force", *(f"--{name}={path}" for name, path in files.items()))
        # slurmctld binds to the address of this machine's name in the cluster's hosts file.
        with_hosts = f"mount --bind {FOLDER}/hosts /etc/hosts && exec slurmctld"
        _run(
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            with_hosts,
            env=self.environment,
        )
        self.wait_until(lambda: "is UP" in self.ask("scontrol", "ping", check=False), seconds=20)

    def stop(self):
        """Ends all processes and removes all files, also those of a killed test."""
        _kill(FOLDER / "slurmctld.pid", "slurmctld")
        for node in self.nodes():
            self._halt(node)
        _kill(FOLDER / "munged.pid", "munged")
        for node in self.nodes():
            _run("ip", "link", "del", _interface(node), check=False)
            _run("ip", "netns", "del", f"{NAME}-{node}", check=False)
        if (FOLDER / "net").exists():
            net = (FOLDER / "net").read_text()
            _run("ip", "route", "del", "blackhole", f"{net}.0/24", check=False)
            _run("ip", "addr", "del", f"{net}.1/32", "dev", "lo", check=False)
        _run("umount", "--lazy", SCRATCH, check=False)
        shutil.rmtree(FOLDER, ignore_errors=True)

    # --------------------------------------------------------------------------------- nodes

    def nodes(self):
        """Returns the names of all nodes."""
        config = FOLDER / "slurm.conf"
        return re.findall(r"^NodeName=(\S+)", config.read_text(), re.M) if config.exists() else []

    def nodes_up(self):
        """Returns the names of the nodes that Slurm can reach."""
        output = self.ask("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False)
        states = [line.split() for line in output.splitlines()]
        return [node for node, state in states if UP.fullmatch(state)]

    def crash(self, node):
        """Simulates a power loss: no packet announces it to the other nodes."""
        self.unplug(node)
        self._halt(node)

    def boot(self, node):
        """Starts a node."""
        self.plug(node)
        pid = FOLDER / f"{node}.pid"
        if pid.exists():
            return
        cgroup = _cgroup(node)
        cgroup.mkdir(parents=True, exist_ok=True)
        into = f"echo $$ > {cgroup}/cgroup.procs; " if FREEZER in cgroup.parents else ""
        spaces = "unshare --mount --uts --ipc --pid --cgroup --fork --propagation private"
        start = f"exec nsenter --net=/run/netns/{NAME}-{node} {spaces} bash {FOLDER}/node.sh {node}"
        log = (FOLDER / "log" / f"{node}.log").open("a")
        # A separate fork, so that the node is not a child of this process.
        command = ["setsid", "--fork", "bash", "-c", into + start]
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)
        self.wait_until(pid.exists, seconds=10)

    def unplug(self, node):
        """Turns a node's network off; its processes keep running."""
        _run("ip", "link", "set", _interface(node), "down")

    def plug(self, node):
        """Turns a node's network on."""
        device, net = _interface(node), (FOLDER / "net").read_text()
        _run("ip", "link", "set", device, "up")
        _run("ip", "route", "replace", f"{_address(node)}/32", "dev", device, "src", f"{net}.1")

    def freeze(self, node):
        """Stops all processes of a node, including slurmd (SIGSTOP)."""
        self.run_on(node, "bash", "-c", "kill -STOP -1")

    def thaw(self, node):
        """Restarts the stopped processes of a node."""
        self.run_on(node, "bash", "-c", "kill -CONT -1")

    def kill_slurmd(self, node):
        """Kills the slurmd of a node; the job's processes keep running."""
        self.run_on(node, "bash", "-c", f"kill -KILL $(cat {FOLDER}/slurmd-{node}.pid)")

    def start_slurmd(self, node):
        """Starts the slurmd of a node again."""
        self.run_on(node, "slurmd", "-N", node)

    def run_on(self, node, *command):
        """Runs a command in a node and returns its output."""
        pid = (FOLDER / f"{node}.pid").read_text().strip()
        spaces = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup")
        return _run("nsenter", "--target", pid, *spaces, "--", *command, env=self.environment)

    def _halt(self, node):
        _kill(FOLDER / f"{node}.pid", "bash")
        cgroup, end = _cgroup(node), time.monotonic() + 2
        while cgroup.exists() and time.monotonic() < end:  # it stays busy for a moment
            for folder in sorted(cgroup.rglob("*/"), reverse=True):
                _run("rmdir", folder, check=False)
            _run("rmdir", cgroup, check=False)

    def _wire(self, node):
        space, device, net = f"{NAME}-{node}", _interface(node), (FOLDER / "net").read_text()
        _run("ip", "netns", "add", space)
        _run("ip", "link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", space)
        _run(
            "sysctl",
            "-qw",
            *(f"net.ipv4.conf.{device}.{v}" for v in ("forwarding=1", "rp_filter=0")),
        )
        for command in (
            "link set lo up",
            f"addr add {_address(node)}/32 dev eth0",
            "link set eth0 up",
            f"route add {net}.0/24 via {net}.1 dev eth0 onlink",
        ):
            if command.startswith("route"):
                self.plug(node)
            _run("ip", "-n", space, *command.split())

    # ---------------------------------------------------------------------------------- jobs

    def ask(self, *command, check=True, cwd=None):
        """Runs one of Slurm's commands and returns its output."""
        return _run(*command, check=check, env=self.environment, cwd=cwd)

    def job(self, number):
        """Returns the fields of a job as Slurm shows them."""
        output = self.ask("scontrol", "show", "job", "-o", str(number))
        return dict(re.findall(r"(\w+)=(\S*)", output.splitlines()[0]))

    def nodes_of(self, number):
        """Returns the names of a job's nodes; the batch script runs on the first."""
        return self.ask("scontrol", "show", "hostnames", self.job(number)["NodeList"]).split()

    @staticmethod
    def wait_until(is_met, *, seconds):
        """Waits until a condition holds.

        Raises:
            TimeoutError: if it does not hold within a number of seconds.
        """
        end = time.monotonic() + seconds
        while not is_met():
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds} s: {is_met}")
            time.sleep(0.1)


def _install():
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if not missing:
        return
    # RUNLEVEL keeps the packages from starting services.
    environment = os.environ | {"RUNLEVEL": "1", "DEBIAN_FRONTEND": "noninteractive"}
    install = ["install", "-y", "--no-install-recommends", *PACKAGES]
    for arguments in (["update"], install):
        output = subprocess.run(
            ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if output.returncode:
        raise SystemExit(f"missing commands {missing}, and apt-get failed:\n{output.stderr}")


def _run(*command, check=True, env=None, cwd=None):
    finished = subprocess.run(
        list(map(str, command)),
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if check and finished.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {finished.stderr}{finished.stdout}")
    return finished.stdout


def _free_net():
    used = _run("ip", "-4", "-o", "addr", "show") + _run("ip", "-4", "route", "show")
    return next(f"10.213.{n}" for n in range(255) if f"10.213.{n}." not in used)


def _interface(node):
    return f"{NAME}-n{node.removeprefix('node')}"


def _address(node):
    return f"{(FOLDER / 'net').read_text()}.{10 + int(node.removeprefix('node'))}"


def _cgroup(node):
    is_here = (FREEZER / "cgroup.procs").exists()
    return FREEZER / f"{NAME}-{node}" if is_here else FOLDER / f"cgroup-{node}"


def _kill(file, command):
    """Kills the process whose pid is in a file, if it still runs that command."""
    if not file.exists():
        return
    pid = int(file.read_text())
    status = Path(f"/proc/{pid}/status")

    def is_alive():
        try:
            output = status.read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return f"Name:\t{command}\n" in output and "State:\tZ" not in output

    for _ in range(100):
        if not is_alive():
            break
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    file.unlink(missing_ok=True)


if __name__ == "__main__":
    operation, *arguments = sys.argv[1:] or ["help"]
    if operation == "start":
        SlurmCluster().start(int(arguments[0]))
    elif hasattr(SlurmCluster, operation):
        print(getattr(SlurmCluster(), operation)(*arguments) or "", end="")
    else:
        raise SystemExit(__doc__)
