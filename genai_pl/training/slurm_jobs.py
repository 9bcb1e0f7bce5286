"""Jobs of a sweep as an array of Slurm: one batch script, in which each job is a command.

A job whose node is lost, that is preempted, or at the end of its time, is requeued and continues. There is no need of
accounting: the queue says what runs, the folders of jobs say what they came to.
"""

import re
import shlex
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from genai_pl.errors import ConfigError, UserError
from genai_pl.training.job_launcher import Job, JobLauncher

PERIOD = 5.0  # seconds between two looks at the queue
SCRIPT, NUMBER = "slurm.sh", "slurm.job"  # in the folder of a sweep: the batch script, and the number of its job
OWN = ("array", "requeue", "no-requeue", "open-mode", "output", "error")  # options of sbatch that the script sets
HEAD = """\
#!/bin/bash
# Jobs of a sweep; written by python train.py -m hydra/launcher=slurm
#SBATCH --array={array}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={output}
{options}
case $SLURM_ARRAY_TASK_ID in
{cases}
esac
"""
TAIL = """\
srun --kill-on-bad-exit=1 "${command[@]}"
status=$?
# 143: saved before the end of the time limit; of a job that is being requeued or cancelled already the state is another
job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
if [ $status -eq 143 ] && [ "$(squeue -h -j "$job" -t RUNNING -o %i)" ]; then
    scontrol requeue "$job"
fi
exit $status
"""


class SlurmLauncher(JobLauncher):
    """Submits the jobs as one array and waits for them.

    options: of sbatch, without the dashes. at_once: how many jobs may run at a time, None for all.
    """

    def __init__(self, options: Mapping[str, object], at_once: int | None) -> None:
        self.options, self.at_once = dict(options), at_once
        for name, value in self.options.items():
            if not (re.fullmatch(r"[\w-]+", name) and str(value).isprintable()):
                raise ConfigError(f"hydra.launcher.options.{name}={value!r}: no option of sbatch in one line")
        for name in OWN:
            if self.options.get(name) is not None:
                raise ConfigError(f"hydra.launcher.options.{name}: set by the launcher; leave it out")

    def stopped(self, sweep: Path) -> str:
        """The last line after a signal."""
        return f"the jobs stay in the queue: scancel $(cat {shlex.quote(str(sweep / NUMBER))}) ends them"

    def start(self, jobs: list[Job], sweep: Path) -> None:
        """Submit the array, and return when none of its jobs is in the queue."""
        number = sweep / NUMBER
        if number.exists() and in_queue(old := number.read_text(encoding="utf-8").strip()):
            raise UserError(f"{sweep}: job {old} of Slurm is still in the queue; wait for it, or scancel {old}")
        script = sweep / SCRIPT
        script.write_text(batch_script(jobs, sweep, self.options, at_once=self.at_once), encoding="utf-8")
        job = call("sbatch", "--parsable", str(script)).partition(";")[0].strip()
        number.write_text(f"{job}\n", encoding="utf-8")
        print(f"slurm       job {job}: {len(jobs)} jobs, {script}; output in slurm-N.log beside it", flush=True)
        while in_queue(job):
            time.sleep(PERIOD)


def batch_script(jobs: list[Job], sweep: Path, options: Mapping[str, object], *, at_once: int | None = None) -> str:
    """The batch script of an array of jobs. options: of sbatch; null leaves one out, true needs no value."""
    array = ",".join(str(job.number) for job in jobs) + (f"%{at_once}" if at_once else "")
    given = {name: value for name, value in options.items() if value is not None}
    lines = ["#SBATCH " + shlex.quote(f"--{k}" + ("" if v is True else f"={v}")) for k, v in given.items()]
    cases = [f"{job.number}) command=({shlex.join(job.command)}) ;;" for job in jobs]
    values = {"array": array, "output": shlex.quote(f"{sweep}/slurm-%a.log"), "options": "\n".join(lines)}
    return HEAD.format(cases="\n".join(cases), **values) + TAIL


def in_queue(job: str) -> bool:
    """Whether a job, or one of its array, waits, runs or ends; True while Slurm does not answer."""
    shown = subprocess.run(["squeue", "-h", "-j", job, "-o", "%i"], capture_output=True, text=True)
    return bool(shown.stdout.strip()) if shown.returncode == 0 else "Invalid job id" not in shown.stderr


def call(*command: str) -> str:
    """Output of a command of Slurm; UserError with its last line if it fails, or is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            f"hydra/launcher=slurm: {command[0]} is not installed here; start it where jobs are submitted"
        ) from None
    if done.returncode:
        reason = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise UserError(f"hydra/launcher=slurm: {reason}")
    return done.stdout
