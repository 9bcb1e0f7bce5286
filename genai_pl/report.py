"""Run report: the lines printed before the first step, and the settings as TensorBoard shows them."""

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from genai_pl.fit import Parts
from genai_pl.length import describe_length, warmup_of
from genai_pl.masking import masked
from genai_pl.modules.base import n_replicas
from genai_pl.modules.rl import RLModule
from genai_pl.peft import adapters_of, describe
from genai_pl.resume import describe_resume
from genai_pl.summary import describe_model, describe_rollout, describe_step, texts_of_row


def announce(config: DictConfig, parts: Parts, checkpoint: Path | None) -> None:
    """Print what is about to be trained, on what, for how long, with which attention."""
    trainer, module, model = parts.trainer, parts.module, parts.module.model
    device = trainer.strategy.root_device
    rows, counted = parts.data.batch_size, {"devices": n_replicas(trainer), "total_steps": module.total_steps}
    if isinstance(module, RLModule):
        options = {"group_size": module.group_size, "max_new_tokens": module.sampling.max_new_tokens}
        step = describe_rollout(prompts=rows, n_updates=module.n_updates(rows), **options, **counted)
    else:
        accumulate = trainer.accumulate_grad_batches
        rows *= texts_of_row(module.data_kind, config.data)
        step = describe_step(model, rows=rows, seq_len=parts.data.seq_len, accumulate=accumulate, **counted)
    if trainer.is_global_zero:
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        print(f"run         {parts.run}")
        if checkpoint:
            print(describe_resume(checkpoint))
        print(f"data        {masked(parts.data.summary())}")
        print(*describe_model(model, device), step, sep="\n")
        print(describe_length(parts.length, warmup_of(module.schedule)))
        if adapters_of(model):
            print(*describe(model), sep="\n")
        print(f"device      {device}{threads}, precision {config.precision.lightning}, seed {config.seed}", flush=True)


def flatten(config: DictConfig) -> dict[str, object]:
    """What shapes the result, resolved, as one level of dotted names: what TensorBoard's HParams shows."""
    flat: dict[str, object] = {}

    def walk(value: object, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else str(key))
        else:
            flat[name] = value if isinstance(value, bool | int | float) else masked(str(value))

    values = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    aside = {"callbacks", "logger", "generation", "output_dir", "dry_run", "plan", "optimized_metric"}
    values["tags"] = ", ".join(values["tags"])
    aside |= {name for name in ("run_name", "tags") if not values[name]}
    walk({k: v for k, v in values.items() if k not in aside}, "")
    return flat
