"""report.html of a run: its facts, collected from the run folder when the run ends; a failure costs one line, not the run.

Everything comes from files that a resumed run continues (metrics.csv, samples.jsonl, train.log), so that the report covers
the whole run, not the part since it was last resumed.
"""

import csv
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from genai_pl.atomic_io import write_atomic
from genai_pl.config.redaction import redact
from genai_pl.reporting.run_page import Curves, RunFacts, Sample, run_page
from genai_pl.training.trust import PER_COMMAND, key_of, read_overrides, untrusted_overrides

log = logging.getLogger(__name__)

REPORT, SAMPLES = "report.html", "samples.jsonl"
SUMMARY = (  # headings of train.log, of twelve characters, before the first step
    *(
        "data",
        "model",
        "attention",
        "step",
        "rollout",
        "length",
        "optimizer",
        "best",
        "early stop",
        "adapter",
        "device",
    ),
)
NOTES = (  # headings that say what was unusual
    *("unused", "changed", "clamped", "diverging", "diverged", "stopped", "early stop", "passed", "schedule", "fp16"),
    *("resuming", "samples", "export", "finished", "notify"),
)
WARNING = re.compile(r"(?:\S+:\d+: )?(\w*Warning: .+)")
PACKAGES = ("genai_pl", "torch", "lightning", "transformers", "datasets", "tokenizers")
MAX_NOTES = 100


def write_run_report(
    folder: Path,
    *,
    results: Mapping[str, float],
    best: tuple[str, int, float] | None,
    device: torch.device,
    error: Exception | None = None,
) -> Path | None:
    """Write report.html into a run folder; its path, or None where it could not be written, which one line says.

    results: metrics at the end. best: metric, step and value of the best validation. device: that trained. error: that ended
    the run, whose line is still to be printed.
    """
    try:
        facts = collect_facts(folder, results=results, best=best, device=device)
        if error is not None:
            facts.notes.append(f"error: {redact(str(error).partition(chr(10))[0] or type(error).__name__)}")
        write_atomic(folder / REPORT, lambda path: path.write_text(run_page(facts), encoding="utf-8"))
    except Exception as failure:  # nothing in a report is worth a trained model
        if error is None:  # else the same disk is full
            log.warning("report      none, it failed: %s: %s", type(failure).__name__, str(failure).partition("\n")[0])
        return None
    return folder / REPORT


def collect_facts(
    folder: Path, *, results: Mapping[str, float], best: tuple[str, int, float] | None, device: torch.device
) -> RunFacts:
    """The facts of a run folder; what it lacks (a logger that was left out) is empty."""
    overrides = read_overrides(folder / ".hydra" / "overrides.yaml") if (folder / ".hydra").is_dir() else []
    typed = [redact(o) for o in overrides if key_of(o) not in PER_COMMAND]
    retyped = [redact(o) for o in untrusted_overrides(overrides, [])]  # which resume does not read from the folder
    summary, notes = read_log(folder / "train.log")
    final = {name: value for name, value in results.items() if name != "best/step"}
    return RunFacts(
        title=f"{summary.pop('run', None) or folder}",
        summary=summary,
        results=final,
        curves=read_curves(folder / "metrics.csv"),
        samples=read_samples(folder / SAMPLES),
        notes=notes,
        command=" ".join(["python train.py", *map(shlex.quote, typed)]),
        resume=" ".join([f"python train.py resume={shlex.quote(str(folder))}", *map(shlex.quote, retyped)]),
        environment=environment(device),
        best=best,
    )


def read_curves(path: Path) -> Curves:
    """Metrics of a metrics.csv by name: steps and values; {} without the file."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    if not path.is_file():
        return curves
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        names = next(rows, [])
        for row in rows:
            for name, cell in zip(names[1:], row[1:], strict=False):
                if cell:
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(int(row[0]))
                    values.append(float(cell))
    return {name: curve for name, curve in curves.items() if any(map(math.isfinite, curve[1]))}


def read_samples(path: Path) -> list[Sample]:
    """Generated texts of a samples.jsonl, those of a later part of the run in the place of earlier ones of that step."""
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Sample(int(row["step"]), str(row["prompt"]), str(row["text"])) for row in rows]


def read_log(path: Path) -> tuple[dict[str, str], list[str]]:
    """Lines of a train.log: those printed before the last start, by heading, and its notes in order, repeated ones once.

    A start begins with a `run` line and ends with a `device` line; the lines at the end of a run have some of the headings, too.
    """
    summary: dict[str, str] = {}
    start: dict[str, str] = {}
    notes: dict[str, None] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        heading, text = line[:12].strip(), line[12:]
        if warning := WARNING.match(line):
            notes.setdefault(warning[1])
        elif line.startswith("error: "):
            notes.setdefault(line)
        elif heading == "run":
            start = {"run": text}
        elif start and heading in SUMMARY:
            start[heading] = text
            if heading == "device":
                summary, start = start, {}
        elif heading == "time":
            summary["time"] = text
        elif heading in NOTES:
            notes.setdefault(f"{heading}: {text}")
    return summary, list(notes)[:MAX_NOTES]


def environment(device: torch.device) -> dict[str, str]:
    """Versions and devices."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": hardware,
        "system": f"{platform.system()} {platform.release()}, {os.cpu_count()} processors",
        "python": sys.version.split()[0],
        **versions,
    }


def _processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.is_file() and (match := re.search(r"model name\s*: (.+)", info.read_text(encoding="utf-8"))):
        return match[1].strip()
    return platform.processor() or platform.machine()
