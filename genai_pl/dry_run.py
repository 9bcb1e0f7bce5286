"""What a run would cost: the configuration in, a table of parameters, FLOPs and memory out; nothing is trained."""

import torch
from omegaconf import DictConfig

from genai_pl.data import pretrained_tokenizer
from genai_pl.errors import ConfigError
from genai_pl.models import build_model
from genai_pl.start import model_config
from genai_pl.summary import describe_memory, describe_model, describe_step


def dry_run(config: DictConfig) -> int:
    """Print what the run would cost, from a model that takes no memory."""
    if "name" in config.model:
        raise ConfigError("dry_run=true needs a model of our own, not model=hf: its estimates know no other")
    n_tokens = {"byte": 258, "bpe": config.tokenizer.get("vocab_size")}.get(config.tokenizer.kind)
    if n_tokens is None:
        n_tokens = len(pretrained_tokenizer(config.tokenizer.name))
    with torch.device("meta"):
        model = build_model(model_config(config, n_tokens))
    device = torch.device("cuda" if torch.cuda.is_available() and config.trainer.accelerator != "cpu" else "cpu")
    devices = config.trainer.devices if isinstance(config.trainer.devices, int) else 1
    shape = {"rows": config.data.batch_size, "seq_len": config.data.seq_len}
    steps = max(config.trainer.max_steps, 0)
    accumulate = config.trainer.accumulate_grad_batches
    print(*describe_model(model, device), sep="\n")
    print(
        describe_step(
            model, **shape, accumulate=accumulate, devices=devices * config.trainer.num_nodes, total_steps=steps
        )
    )
    name = config.optimizer._target_.rpartition(".")[2]
    print(*describe_memory(model, **shape, optimizer=name, precision=config.precision.lightning), sep="\n", flush=True)
    return 0
