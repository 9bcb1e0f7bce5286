"""Layers of the package, stated once: `python docs/make_layers.py` writes them into CONTRIBUTING.md and repository.md.

An import may only point to a layer further up this list; tests/test_layers.py checks that, and that the pages agree.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("CONTRIBUTING.md", "docs/repository.md")

# the modules and folders of a layer, and what they hold
LAYERS = [
    ("errors", "errors that a user can cause, one line each"),
    (
        "atomic_io devices endpoints imports object_storage plugins progress ranks",
        "whole files, devices, servers, late imports, files at s3://, own modules, progress bars, ranks of processes",
    ),
    (
        "config signals reporting",
        "plain data: models, decoding, bounds of options; signals that end a command; reports as HTML",
    ),
    ("kernels distributed", "attention and cross entropy; sharded tensors and tensor-parallel collectives"),
    ("objectives optim checkpoints", "pure losses and collators, optimizers and schedules, checkpoint files"),
    ("models", "one Transformer in three shapes; Hugging Face and ONNX folders"),
    ("data peft", "text to batches; adapters, functions from model to model"),
    ("generation environments", "decoding: tokens and text out of a model; tasks of several turns"),
    ("modules evaluation", "LightningModules with one `step` each; likelihoods, scores and metrics"),
    ("callbacks strategies", "what Lightning lacks; FSDP2, tensor and pipeline parallelism"),
    ("remote_models", "trained models in object storage"),
    ("references planning exporting", "names of trained models; cost of a step elsewhere; folders for others"),
    ("loading", "a trained model from any of its names"),
    ("recipes serving", "data and commands of whole examples; the batching engine and its routes"),
    ("training", "a run from configuration to exported folder"),
    ("cli", "what each command does, and everything of Hydra"),
    ("api", "the commands as functions"),
]
# frameworks that few layers may import
FRAMEWORKS = {
    "hydra": {"training", "cli", "api"},
    "omegaconf": {"training", "cli", "api"},
    "lightning": {"modules", "callbacks", "strategies", "training", "data"},
}


def table() -> str:
    """The layers as lines of a code block, the uppermost first."""
    width = max(len(names) for names, _ in LAYERS) + 2
    return "\n".join(f"{names:<{width}}{text}" for names, text in reversed(LAYERS))


def with_table(page: str) -> str:
    """The text of a page with the layers between its two marks."""
    block = f"<!-- layers -->\n```\n{table()}\n```\n<!-- /layers -->"
    return re.sub(r"<!-- layers -->.*<!-- /layers -->", lambda _: block, page, flags=re.DOTALL)


if __name__ == "__main__":
    for name in PAGES:
        path = ROOT / name
        path.write_text(with_table(path.read_text()))
