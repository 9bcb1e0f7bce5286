"""Samples: text that the model generates during training, in the console, in TensorBoard and in samples.jsonl."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from genai_pl.atomic_io import naming, write_atomic
from genai_pl.callbacks.due import PeriodicCallback
from genai_pl.config.enums import Shape
from genai_pl.config.generation import GenerationConfig
from genai_pl.generation import generate_text
from genai_pl.modules.policy_gradient import PolicyGradientModule
from genai_pl.modules.rollout import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Samples(PeriodicCallback):
    """Continues each prompt every n optimizer steps.

    every_n_steps: optimizer steps between samples; the last step always gives some
    prompts: function of no arguments that returns the texts to continue
    config: how to generate
    tokenizer: of the model
    file: JSON lines of step, prompt and text; None: no file
    say: where to print
    spent: told the seconds that samples of a step have taken
    seed: of a generator of their own: training draws the same numbers with and without samples

    A policy that learns from rollouts shows completions of those instead, with score and KL, in training and
    validation.
    """

    def __init__(
        self,
        *,
        every_n_steps: int,
        prompts: Callable[[], Sequence[str]],
        config: GenerationConfig,
        tokenizer: "PreTrainedTokenizerBase",
        file: Path | None = None,
        say: Callable[[str], None] = print,
        spent: Callable[[float], None] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_steps, spent)
        self.prompts, self.config, self.seed = prompts, config, seed
        self.tokenizer, self.file, self.say = tokenizer, file, say

    def act(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        """Show samples. All ranks enter the gather of sharded weights; the first generates."""
        if not isinstance(module, PolicyGradientModule):
            with module.unsharded_model(), trainer.precision_plugin.forward_context():
                if trainer.is_global_zero:
                    self._show_continuations(trainer, module, step)
        elif trainer.is_global_zero:
            self._show_scored(trainer, module.examples, "training", step)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Show scored completions of the validation."""
        if isinstance(module, PolicyGradientModule) and trainer.is_global_zero and not module.validation_cut:
            self._show_scored(trainer, module.examples, "validation", trainer.global_step)

    def _show_continuations(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        """Generate and show a continuation of each prompt."""
        generator = torch.Generator(module.device).manual_seed(self.seed)
        prompts = self.prompts()
        texts = generate_text(module.model, self.tokenizer, prompts, self.config, generator=generator)
        apart = "\n" if module.model.config.shape is Shape.encoder_decoder else ""  # its target is a text of its own
        for prompt, (text, *_) in zip(prompts, texts, strict=True):
            sample = f"{prompt}{apart}{text}"
            self.say(f"--- step {step} ---\n{sample}\n---")
            self._keep(step, f"{prompt}{apart}", text)
            quoted = "\n".join(f"    {line}" for line in sample.splitlines())
            _add_text(trainer, f"samples/{prompt.strip() or 'empty'}", quoted, step)

    def _show_scored(self, trainer: L.Trainer, examples: Sequence[Example], part: str, step: int) -> None:
        """Show completions with score and KL, and a Markdown table of them in TensorBoard."""
        for prompt, completion, score, kl in examples:
            self.say(f"--- step {step}, {part}: score {score:.3f}, KL {kl:.3f} ---\n{prompt}{completion}\n---")
            self._keep(step, prompt, completion, part=part, score=score, kl=kl)
        rows = [f"| {_cell(e.prompt)} | {_cell(e.completion)} | {e.score:.3f} | {e.kl:.3f} |" for e in examples]
        table = ["| prompt | completion | score | KL |", "|---|---|---|---|", *rows]
        _add_text(trainer, f"samples/{part}", "\n".join(table), step)

    def resume(self, step: int) -> None:
        """Drop the samples of later steps, which a resumed run makes again, and a line that a crash cut short."""
        if self.file is None or not self.file.exists():
            return
        rows = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                rows += [line] if json.loads(line)["step"] <= step else []
            except (ValueError, KeyError, TypeError):
                continue
        text = "".join(f"{row}\n" for row in rows)
        write_atomic(self.file, lambda path: path.write_text(text, encoding="utf-8"))

    def _keep(self, step: int, prompt: str, text: str, **more: object) -> None:
        """Append a sample to the file."""
        if self.file is None:
            return
        row = json.dumps({"step": step, "prompt": prompt, "text": text, **more}, ensure_ascii=False, default=float)
        with naming(self.file), self.file.open("a", encoding="utf-8") as file:
            file.write(f"{row}\n")


def _add_text(trainer: L.Trainer, name: str, text: str, step: int) -> None:
    """Send a text to all TensorBoard loggers."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, text, step)


def _cell(text: str) -> str:
    """The text in a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", "<br>")
