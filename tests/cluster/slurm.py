"""A Slurm cluster on one machine: munge, slurmctld, and one slurmd per node, each with a port and a folder of its own.

    python tests/cluster/slurm.py start      then: export SLURM_CONF=/tmp/slurm-test-USER/slurm.conf; sinfo
    python tests/cluster/slurm.py stop

Needs Debian's packages (apt install slurm-wlm munge) and no root: the daemons run as the user who starts them. There is no
accounting, and processes are followed by their parents, not by cgroups, so that it runs in a container. Everything is in one
folder, which `stop` removes. All nodes are this machine, so a job names it to its processes: MASTER_ADDR=127.0.0.1.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"  # daemons are there, which is not in everybody's PATH
NODES = ("node1", "node2")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# a requeued job may start when its old credential has expired: by default after two minutes
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# a node that does not answer for so long is down, and its jobs are requeued
SlurmdTimeout={timeout}
SlurmctldParameters=idle_on_node_suspend
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
ReturnToService=2
# seconds between SIGTERM and SIGKILL, when a job is requeued, cancelled or out of time
KillWait=30
# a job of the partition `high` takes the nodes of one in `low`, which is requeued
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=60 PriorityTier=1
PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=2
"""


def missing() -> str:
    """The program of PROGRAMS that is not installed; empty where all are."""
    return next((name for name in PROGRAMS if shutil.which(name, path=PATH) is None), "")


class Cluster:
    """A running or stopped cluster in a folder.

    folder: of its configuration, state, logs and sockets. cpus: that each node claims, whatever the machine has.
    """

    def __init__(self, folder: Path, *, nodes: tuple[str, ...] = NODES, cpus: int = 2, timeout: int = 10) -> None:
        self.folder, self.nodes, self.cpus, self.timeout = folder.absolute(), nodes, cpus, timeout
        self.daemons: dict[str, subprocess.Popen] = {}  # that this process has started
        self.environment = {
            **{
                name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SRUN_", "SBATCH_"))
            },
            "PATH": PATH,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        """Write the configuration, start all daemons, and return when all nodes are idle."""
        self.folder.mkdir(parents=True)
        (self.folder / "state").mkdir()
        ports = free_ports(1 + len(self.nodes))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} State=UNKNOWN"
            for name, port in zip(self.nodes, ports[1:], strict=True)
        )
        values = {"user": getpass.getuser(), "folder": self.folder, "ports": ports, "nodes": nodes}
        text = CONFIGURATION.format(timeout=self.timeout, **values)
        (self.folder / "slurm.conf").write_text(text, encoding="utf-8")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {name: self.folder / f"munge.{name}" for name in ("socket", "log", "pid", "seed")}
        named = [
            f"--{option}={files[name]}"
            for option, name in {"socket": "socket", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}.items()
        ]
        self._daemon("munged", "--foreground", "--force", "--num-threads=2", f"--key-file={key}", *named)
        wait_until(files["socket"].exists, "munged")
        self._daemon("slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        for name in self.nodes:
            self.start_node(name)

    def start_node(self, name: str) -> None:
        """Start the daemon of a node, and return when the node can take jobs."""
        (self.folder / name).mkdir(exist_ok=True)
        self._daemon("slurmd", "-D", "-N", name, "-f", self.environment["SLURM_CONF"], log=name)
        wait_until(
            lambda: self.run("sinfo", "-hn", name, "-o", "%t", check=False).strip() in ("idle", "mix", "alloc"), name
        )

    def kill_node(self, name: str) -> None:
        """End a node as a power cut does: its daemon and all processes of its jobs by SIGKILL, nothing told to anybody."""
        tasks = [pid for pid in pids() if f"SLURMD_NODENAME={name}" in environment_of(pid) and self._owns(pid)]
        steps = {parent_of(pid) for pid in tasks}
        steps = {pid for pid in steps if "slurmstepd" in command_of(pid)}
        for pid in [*self._daemon_pids(name), *steps, *tasks]:
            kill(pid)
        self._forget(name)

    def stop(self) -> None:
        """Cancel all jobs, end all daemons, remove the folder."""
        if self._daemon_pids("slurmctld"):
            self.run("scancel", "--user", getpass.getuser(), check=False)
            with suppress(TimeoutError):
                wait_until(lambda: not self.run("squeue", "-h", check=False).strip(), "jobs", seconds=40)
        for name in self.nodes:
            self.kill_node(name)
        for name in ("slurmctld", "munged"):
            for pid in self._daemon_pids(name):
                kill(pid)
            self._forget(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str, check: bool = True, **options: object) -> str:
        """Output of a command of Slurm, or of anything else that is to see the cluster."""
        given = {"env": self.environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        result = subprocess.run(command, **{**given, **options})
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {result.returncode}: {result.stdout}")
        return result.stdout

    def submit(self, *arguments: str, **options: object) -> str:
        """The number of a job, after sbatch."""
        return self.run("sbatch", "--parsable", *arguments, **options).strip()

    def state(self, job: str) -> str:
        """State of a job in Slurm's words, such as RUNNING, PENDING, COMPLETED."""
        shown = self.run("scontrol", "show", "job", job, check=False)
        return field(shown, "JobState")

    def wait(self, job: str, *states: str, seconds: float = 120) -> str:
        """The state of a job, when it is one of these (default: an end)."""
        ends = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        wait_until(lambda: self.state(job) in ends, f"job {job}", seconds=seconds)
        return self.state(job)

    def _daemon(self, program: str, *arguments: str, log: str = "") -> None:
        """Start a daemon in the foreground of a session of its own, and note its process id."""
        with (self.folder / f"{log or program}.out").open("ab") as out:
            streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
            path = shutil.which(program, path=PATH)
            process = subprocess.Popen([path, *arguments], env=self.environment, start_new_session=True, **streams)
        self.daemons[log or program] = process
        (self.folder / f"{log or program}.id").write_text(str(process.pid), encoding="utf-8")

    def _daemon_pids(self, name: str) -> list[int]:
        """The process of a daemon, if it runs."""
        file = self.folder / f"{name}.id"
        pid = int(file.read_text(encoding="utf-8")) if file.exists() else 0
        return [pid] if pid and str(self.folder) in command_of(pid) else []

    def _forget(self, name: str) -> None:
        """Wait for a daemon that this process has started and killed."""
        if process := self.daemons.pop(name, None):
            process.wait()

    def _owns(self, pid: int) -> bool:
        """Whether a process belongs to a job of this cluster, not to one of another on the same machine."""
        return f"SLURM_CONF={self.folder}/slurm.conf" in environment_of(pid)


def field(shown: str, name: str) -> str:
    """A value of what `scontrol show` prints."""
    return next((word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}=")), "")


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_until(condition: Callable[[], bool], what: str, *, seconds: float = 30) -> None:
    """Return when the condition holds; TimeoutError if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.1)


def pids() -> list[int]:
    """All processes of this machine."""
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def environment_of(pid: int) -> list[str]:
    """Variables that a process was started with; empty where it has gone or is another user's."""
    return _read(pid, "environ").split("\0")


def command_of(pid: int) -> str:
    """The command line of a process; empty where it has gone."""
    return _read(pid, "cmdline").replace("\0", " ")


def parent_of(pid: int) -> int:
    """The process that started another one; 0 where it has gone."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return int(fields[1]) if fields else 0


def _read(pid: int, name: str) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    return ""


def kill(pid: int) -> None:
    """SIGKILL, unless the process has gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def running(folder: Path, **options: object) -> Iterator[Cluster]:
    """A cluster for as long as the context lasts."""
    cluster = Cluster(folder, **options)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def main(action: str) -> None:
    """Start or stop the cluster of this user."""
    cluster = Cluster(Path("/tmp") / f"slurm-test-{getpass.getuser()}")
    if action == "start":
        if name := missing():
            sys.exit(f"error: {name} is not installed: apt install slurm-wlm munge")
        if cluster.folder.exists():
            sys.exit(f"error: {cluster.folder} exists: stop the cluster first")
        cluster.start()
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']} MASTER_ADDR=127.0.0.1")
        print(cluster.run("sinfo", "-N"), end="")
    else:
        cluster.stop()


if __name__ == "__main__":
    if sys.argv[1:] not in (["start"], ["stop"]):
        sys.exit("usage: python tests/cluster/slurm.py start | stop")
    main(sys.argv[1])
