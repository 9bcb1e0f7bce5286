"""What a run says before it starts and after it ends."""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from genai_pl.config.enums import AttentionKind
from genai_pl.kernels import choose_backend
from genai_pl.models import Model, flops_per_token, n_parameters


def describe_model(model: Model, device: torch.device) -> list[str]:
    """Lines on size and attention."""
    c = model.config
    backend, why = choose_backend(device, softcap=c.softcap, backend=c.attention.value)
    layers = f"{c.n_layer} layers" if c.n_decoder_layer is None else f"{c.n_layer} + {c.n_decoder_layer} layers"
    kind = "" if c.attention_kind is AttentionKind.full else f", kind {c.attention_kind.value}"
    return [
        f"model       {n_parameters(model):,} parameters ({n_parameters(model, trainable=True):,} trainable): "
        f"{c.shape.value}, {layers}, {c.n_embd} wide, {c.n_head} heads, {c.vocab_size:,} tokens, context {c.max_seq_len}",
        f"attention   {backend}: {why}{kind}",
    ]


def texts_of_row(kind: str, data: Mapping[str, object]) -> int:
    """How many texts a row of a kind of data is for the model: a pair of completions, or texts that belong together.

    >>> texts_of_row("preference", {}), texts_of_row("pairs", {"negative": "worse"}), texts_of_row("text", {})
    (2, 3, 1)
    """
    return {"preference": 2, "pairs": 3 if data.get("negative") else 2}.get(kind, 1)


def describe_step(
    model: Model, *, rows: int, seq_len: int, accumulate: int, devices: int, total_steps: int | None
) -> str:
    """One line on what an optimizer step takes; total_steps: None if that is not known."""
    tokens = rows * seq_len * accumulate * devices
    flops = flops_per_token(model, model.config, seq_len) * tokens
    whole = "" if total_steps is None else f"; {total_steps:,} steps = {tokens * total_steps:,} tokens"
    return (
        f"step        {tokens:,} tokens ({rows} rows x {seq_len} x {accumulate} batches x {devices} devices), "
        f"{flops:.3g} FLOPs{whole}"
    )


def describe_rollout(
    *, prompts: int, group_size: int, devices: int, max_new_tokens: int, n_updates: int, total_steps: int | None
) -> str:
    """One line on what is written before it is learned from, where a model learns from what it writes."""
    whole = "" if total_steps is None else f"; {total_steps:,} steps = {-(-total_steps // n_updates):,} rollouts"
    return (
        f"rollout     {prompts * group_size * devices:,} completions ({prompts} prompts x {group_size} x {devices} devices) "
        f"of at most {max_new_tokens} tokens, then {n_updates} steps{whole}"
    )


def format_bytes(n_bytes: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.4g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.4g} TiB"


def final_lines(
    run: Path,
    *,
    exported: str | None,
    finished: bool,
    generate: Mapping[str, object],
    arguments: Iterable[str] = (),
    sweep: Path | None = None,
) -> list[str]:
    """Where everything lies, and the next command to type.

    generate: what generate.py is to be given beside the run. again: the words that a resume needs beside its folder; whole: that
    of the sweep which goes on, where the run is a job of one.
    """
    lines = [f"run         {run}", f"checkpoint  {run / 'checkpoints' / 'last.ckpt'}"]
    if exported:
        lines += [f"{exported:<12}{run / exported}"]
    if (run / "tensorboard").exists():
        lines += [f"curves      {shlex.join(['tensorboard', '--logdir', str(run)])}"]
    if finished:
        return [*lines, f"next        python generate.py {shell_arguments({'checkpoint': run, **generate})}"]
    return [
        *lines,
        f"next        python train.py {shlex.join(arguments)}{' ' * bool(arguments)}{shell_arguments({'resume': sweep or run})}",
    ]


def shell_arguments(options: Mapping[str, object]) -> str:
    """Options as a shell takes them, each value as a whole; a command quotes for Hydra what it is given.

    >>> print(shell_arguments({"checkpoint": "runs/a b", "prompt": "it's", "score": True}))
    checkpoint='runs/a b' prompt='it'"'"'s' score=true
    """
    words = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in options.items()}
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in words.items())
