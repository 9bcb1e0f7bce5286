"""A plain loop over transformers' model, one row at a time, and data for it."""

import json
from pathlib import Path

import torch
from torch import nn

CONTEXT = 24  # tokens that the model reads at once


@torch.no_grad()
def reference_nll(theirs: nn.Module, given: list[int], scored: list[int]) -> tuple[float, list[bool]]:
    """Negative log-likelihood of the tokens `scored` after `given`, and which of them are the most likely ones."""
    logits = theirs(torch.tensor([(given + scored)[:-1]])).logits[0, -len(scored) :].double()
    goal = torch.tensor(scored)
    nll = -logits.log_softmax(-1).gather(1, goal[:, None]).sum().item()
    return nll, (logits.argmax(-1) == goal).tolist()


@torch.no_grad()
def greedy_text(theirs: nn.Module, text: str, n: int) -> str:
    """The n most likely next bytes."""
    ids = list(text.encode())
    for _ in range(n):
        ids.append(int(theirs(torch.tensor([ids[-CONTEXT:]])).logits[0, -1].argmax()))
    return bytes(ids[len(ids) - n :]).decode()


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
