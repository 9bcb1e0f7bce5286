"""All that one GPU can tell, in eight minutes: python benchmarks/gpu.py [--out gpu.json] [STAGE ...]

Stages (gpu_stages.py), in this order, each with lines of its own and an entry in the JSON file:

probe          what `model.attention=auto` becomes for three models; a candidate that is left out counts as wrong
numbers        attention of the Triton kernels, forward and backward, in bf16 and fp16 against float64: masks, options of the
               scores, head sizes, 32k keys; linear cross entropy likewise. Wrong is more than twice the error of eager code
decoding       tokens per second of random weights, for one row and for 16, with and without CUDA graphs
training       tokens per second, MFU and memory of `train.py`, eager and compiled
attention      milliseconds, TFLOP/s and MiB beside SDPA's backends, varlen_attn and FlexAttention
cross_entropy  the same of linear cross entropy beside full logits

Several stages are processes of their own, so that one that fails, hangs or breaks the GPU's context ends alone. Each has a
share of --minutes, and what it leaves goes to the next; what is due later is left out. The file, and a table beside it (.md),
are written after every stage, that of a single stage after every case. An exit status of 1 says that numbers were wrong, or a
stage or case failed.
--interpret runs all stages on tiny shapes without a GPU: numbers count, times are left out.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if "--interpret" in sys.argv:  # before Triton is imported
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

Report = dict[str, Any]
SCRIPT = Path(__file__)
SHARES = {  # of the time
    "probe": 0.05,
    "numbers": 0.25,
    "decoding": 0.08,
    "training": 0.32,
    "attention": 0.23,
    "cross_entropy": 0.07,
}
GRACE = 15.0  # seconds after its end before a stage is killed: a case that has begun may finish
LEAST = 5.0  # seconds that a stage is worth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(SHARES))
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--interpret", action="store_true")
    options = parser.parse_args()
    unknown = sorted(set(options.stages) - set(SHARES))
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}: choose of {', '.join(SHARES)}")
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes:g}: give more than 0")
    options.stages = [stage for stage in SHARES if stage in options.stages] or list(SHARES)
    options.end = time.monotonic() + 60 * options.minutes
    if len(options.stages) > 1:
        sys.exit(run_apart(options))
    import torch

    if not options.interpret and not torch.cuda.is_available():
        parser.error("torch sees no GPU: --interpret runs the same stages on tiny shapes without one")
    sys.exit(run_here(options, options.stages[0]))


def run_apart(options: argparse.Namespace) -> int:
    """Run each stage in a process of its own; the exit status."""
    begin, report, failed = time.monotonic(), {}, False
    for n, stage in enumerate(options.stages):
        left, shares = options.end - time.monotonic(), [SHARES[name] for name in options.stages[n:]]
        seconds = left * shares[0] / sum(shares)
        if seconds < LEAST:
            part, status = {stage: {"stage": {"left out": "the time was up"}}}, 0
        else:
            part, status = run_child(options, stage, seconds)
        if status == 2 and stage not in part:  # it cannot run at all, and has said why
            return 2
        failed |= status != 0
        report = {**report, **part}
        write(report, options.out)
        options.out.with_suffix(".md").write_text(table(report), encoding="utf-8")
    wrong = "something was wrong or failed" if failed else "nothing was wrong"
    print(f"{time.monotonic() - begin:.0f} s, {wrong}; all figures are in {options.out}")
    return int(failed)


def run_child(options: argparse.Namespace, stage: str, seconds: float) -> tuple[Report, int]:
    """What one stage has reported until it ended or was killed, and its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        command = [sys.executable, str(SCRIPT), stage, "--out", str(out), "--minutes", str(seconds / 60)]
        child = subprocess.Popen([*command, *["--interpret"] * options.interpret], start_new_session=True)
        try:
            status, end = child.wait(seconds + GRACE), "ended"
        except subprocess.TimeoutExpired:
            status, end = 1, f"was killed after {seconds + GRACE:.0f} s, as a case did not end"
        finally:
            stop(child)
        part: Report = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        if status < 0:
            end = f"was killed by {signal.Signals(-status).name}"
        if status < 0 or end != "ended" or (status == 1 and stage not in part):
            part.setdefault(stage, {})["stage"] = {"failed": f"it {end}" if end != "ended" else "it did not begin"}
            print(f"{stage:13s} the stage {end}", flush=True)
        return part, status


def stop(child: subprocess.Popen) -> None:
    """End a stage with all that it has started."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def run_here(options: argparse.Namespace, stage: str) -> int:
    """Run the cases of a stage until its time is up; 0, or 1 if numbers were wrong or a case failed."""
    from gpu_stages import STAGES

    options.device = "cpu" if options.interpret else "cuda"
    options.repeats, options.heads, options.kv_heads = 10, 16, None
    options.probe_length = 64 if options.interpret else 4096
    report, failed = {"machine": machine(options), stage: {}}, 0
    for name, measure in STAGES[stage](options):
        if time.monotonic() > options.end:
            figures = {"left out": "the time was up"}
        else:
            try:
                figures = measure()
            except subprocess.TimeoutExpired:
                figures = {"left out": "the time was up before its end"}
            except Exception as error:  # the next case may still run
                figures = {"failed": (f"{type(error).__name__}: {error}".splitlines() or [""])[0]}
        failed += "failed" in figures or figures.get("right", figures.get("runs")) is False
        report[stage][name] = figures
        print(f"{stage:13s} {name:36s} {shown(figures)}", flush=True)
        write(report, options.out)
    return int(failed > 0)


def machine(options: argparse.Namespace) -> Report:
    import torch

    name = platform.processor() or platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": version("triton")}
    return {"device": name if options.interpret else torch.cuda.get_device_name(), **versions}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def shown(figures: Report) -> str:
    items = ((key, f"{value:.4g}" if type(value) is float else str(value)) for key, value in figures.items())
    return "  ".join(f"{key} {value}" for key, value in items)


def table(report: Report) -> str:
    """The figures as a page of Markdown: a table for each stage, whose columns are what any of its cases has."""
    lines = [f"Measured on {', '.join(f'{key} {value}' for key, value in report.get('machine', {}).items())}.", ""]
    for stage, cases in report.items():
        if stage == "machine":
            continue
        columns = list(dict.fromkeys(key for figures in cases.values() for key in figures))
        lines += [f"## {stage}", "", f"| case | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for name, figures in cases.items():
            cells = (shown({"": figures[key]}).strip() if key in figures else "" for key in columns)
            lines.append(f"| {name} | {' | '.join(cell.replace('|', '/') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def write(report: Report, path: Path) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
