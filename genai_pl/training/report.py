"""Lines that a run prints: the model, the step and the rollout before it starts, the commands to type after it ended."""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from genai_pl.config.enums import AttentionKind
from genai_pl.kernels import ScoreOptions, choose_backend
from genai_pl.models import Model, WrappedDecoder, flops_per_token, n_active_parameters, n_parameters
from genai_pl.models.attention_choice import probe_shape


def describe_model(
    model: Model | WrappedDecoder, device: torch.device, *, dtype: torch.dtype, seq_len: int, probes: bool = False
) -> list[str]:
    """Lines on the model's size and on the attention backend for rows of seq_len tokens, with the reason for that backend.

    dtype: of products. probes: whether a probe chooses what auto is, when the run starts.
    """
    c = model.config
    options = {"backend": c.attention.value, "dtype": dtype, "head_dim": c.head_dim}
    backend, why = choose_backend(
        device, lengths=(seq_len, seq_len), options=ScoreOptions(softcap=c.softcap), **options
    )
    if probes and probe_shape(model, dtype, length=seq_len, backward=True) is not None:
        backend, why = "auto", "a probe of this GPU chooses before the first step"
    if isinstance(model, WrappedDecoder) and not model.route.ours:
        backend, why = "transformers", model.route.notes[0]
    layers = f"{c.n_layer} layers" if c.n_decoder_layer is None else f"{c.n_layer} + {c.n_decoder_layer} layers"
    kind = "" if c.attention_kind is AttentionKind.full else f", kind {c.attention_kind.value}"
    trainable = f"{n_parameters(model, trainable=True):,} trainable"
    if c.n_experts:
        trainable += f", {n_active_parameters(model):,} active per token"
        layers += f", {c.n_experts} experts in {len(c.mixture_layers)}"
    return [
        f"model       {n_parameters(model):,} parameters ({trainable}): "
        f"{c.shape.value}, {layers}, {c.n_embd} wide, {c.n_head} heads, {c.vocab_size:,} tokens, context {c.max_seq_len}",
        f"attention   {backend}: {why}{kind}",
    ]


def texts_of_row(kind: str, data: Mapping[str, object]) -> int:
    """Sequences that the model reads for one row of data: 2 for a pair of completions, 2 or 3 for texts to embed,
    else 1.

    >>> texts_of_row("preference", {}), texts_of_row("pairs", {"negative": "worse"}), texts_of_row("text", {})
    (2, 3, 1)
    """
    return {"preference": 2, "pairs": 3 if data.get("negative") else 2}.get(kind, 1)


def describe_step(
    model: Model, *, rows: int, seq_len: int, accumulate: int, devices: int, total_steps: int | None
) -> str:
    """One line on an optimizer step: its tokens, and its FLOPs by the count of Chowdhery et al. 2022 (PaLM,
    appendix B).

    rows: sequences of one micro-batch. accumulate: micro-batches of a step. total_steps: None where the length
    is unknown.
    """
    tokens = rows * seq_len * accumulate * devices
    flops = flops_per_token(model, model.config, seq_len) * tokens
    whole = "" if total_steps is None else f"; {total_steps:,} steps = {tokens * total_steps:,} tokens"
    return (
        f"step        {tokens:,} tokens ({rows} rows x {seq_len} x {accumulate} batches x {devices} devices), "
        f"{flops:.3g} FLOPs{whole}"
    )


def describe_rollout(
    *,
    prompts: int,
    group_size: int,
    devices: int,
    max_new_tokens: int,
    n_updates: int,
    total_steps: int | None,
    max_turns: int | None = None,
) -> str:
    """One line on a rollout: completions that are sampled and scored before `n_updates` optimizer steps learn from
    them; max_turns: of episodes in an environment.
    """
    kind, turns = ("completions", "") if max_turns is None else ("episodes", f"{max_turns} turns of ")
    whole = "" if total_steps is None else f"; {total_steps:,} steps = {-(-total_steps // n_updates):,} rollouts"
    return (
        f"rollout     {prompts * group_size * devices:,} {kind} ({prompts} prompts x {group_size} x {devices} devices) "
        f"of at most {turns}{max_new_tokens} tokens, then {n_updates} steps{whole}"
    )


def format_bytes(n_bytes: float) -> str:
    """Bytes with a binary unit and four digits.

    >>> format_bytes(1536), format_bytes(3 * 2**40)
    ('1.5 KiB', '3 TiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.4g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.4g} TiB"


def describe_seconds(training: float, **parts: float) -> str:
    """One line on where the time of training went, by parts in seconds; what is left are the steps.

    >>> describe_seconds(10.0, data=1.0, validation=2.0, checkpoints=0.25, samples=0.0)
    'time        10.0 s of training: steps 6.8, data wait 1.0, validation 2.0, checkpoints 0.2, samples 0.0'
    """
    names = {"data": "data wait"}
    listed = {"steps": max(training - sum(parts.values()), 0.0), **parts}
    return f"time        {training:.1f} s of training: " + ", ".join(
        f"{names.get(k, k)} {v:.1f}" for k, v in listed.items()
    )


def final_lines(
    run: Path,
    *,
    exported: str | None,
    finished: bool,
    generate: Mapping[str, object],
    arguments: Iterable[str] = (),
    sweep: Path | None = None,
    best: str | None = None,
    report: Path | None = None,
) -> list[str]:
    """Lines at the end of a run: where its files are, and the next command to type.

    exported: name of the exported folder in the run folder, None if nothing was exported. generate: options of
    generate.py beside `checkpoint=`. arguments: words that a resume needs beside its folder. sweep: folder of
    the sweep that goes on as a whole, for a job of one. best: path of the best checkpoint, with its step.
    report: the written report, if there is one.
    """
    # what there is, then one command: to try the model, or to go on
    lines = [f"run         {run}", f"checkpoint  {run / 'checkpoints' / 'last.ckpt'}"]
    if best:
        lines += [f"best        {best}"]
    if exported:
        lines += [f"{exported:<12}{run / exported}"]
    if report:
        lines += [f"report      {report}"]
    if (run / "tensorboard").exists():
        lines += [f"curves      {shlex.join(['tensorboard', '--logdir', str(run)])}"]
    if finished:
        return [*lines, f"next        python generate.py {shell_arguments({'checkpoint': run, **generate})}"]
    return [
        *lines,
        f"next        python train.py {shlex.join(arguments)}{' ' * bool(arguments)}{shell_arguments({'resume': sweep or run})}",
    ]


def shell_arguments(options: Mapping[str, object]) -> str:
    """Options as words of a POSIX shell; Hydra's quoting is added by the command that reads them.

    >>> print(shell_arguments({"checkpoint": "runs/a b", "prompt": "it's", "score": True}))
    checkpoint='runs/a b' prompt='it'"'"'s' score=true
    """
    words = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in options.items()}
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in words.items())
