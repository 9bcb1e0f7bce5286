"""What the benchmarks of rollouts share: prompts of a file, and a LoRA policy of ours that learns from what it writes."""

import json
import tempfile
from pathlib import Path
from typing import Any

from sides import fit, training


def prompts(path: str, n: int) -> list[str]:
    """The first n of a file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["prompt"] for _, line in zip(range(n), file, strict=False)]


def learner(kind: type, objective: str, name: str, **options: object) -> tuple[Any, Any]:
    """The module of conf/objective with a LoRA policy on the model `name` and some options of its own, and its tokenizer."""
    import torch
    from omegaconf import OmegaConf

    from genai_pl.data import special_tokens
    from genai_pl.loading import load
    from genai_pl.peft import lora

    torch.manual_seed(0)
    model, tokenizer, _ = load(name)
    conf = OmegaConf.to_container(OmegaConf.load(Path(__file__).parent.parent / f"conf/objective/{objective}.yaml"))
    conf = {key: value for key, value in conf.items() if key != "defaults" and not key.startswith("_")}
    known = special_tokens(tokenizer, model.config.vocab_size)
    module = kind(lora(model.train()), vocabulary=known, seed=0, **training(1e-6), **{**conf, **options})
    return module, tokenizer


def fit_prompts(
    module: Any, tokenizer: Any, texts: list[str], *, batch: int, prompt_len: int, new: int, updates: int
) -> list[float]:
    """The times at which Lightning's Trainer ended the rollouts, of `batch` prompts each."""
    from genai_pl.data.prompts import PromptsDataModule

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prompts.jsonl")
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in [*texts, "held"]), encoding="utf-8")
        data = PromptsDataModule(
            path=str(path), val_path=None, val_fraction=1e-9, prompt="prompt", max_prompt_len=prompt_len, batch_size=batch,
            val_batch_size=None, workers=0, shuffle=False, seed=0, seq_len=prompt_len + new,
        )  # fmt: skip
        data.prepare(tokenizer, module.collator)
        return fit(module, data, updates)
