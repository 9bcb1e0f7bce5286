"""Text written by the model while it learns, in the console and in TensorBoard."""

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from genai_pl.generation import generate_text
from genai_pl.specs import GenerationConfig


class Samples(L.Callback):
    """Continues each prompt every n optimizer steps, from a generator of its own, so that training draws the same numbers."""

    def __init__(self, *, every_n_steps: int, prompts: list[str], config: GenerationConfig, seed: int = 0) -> None:
        self.every_n_steps, self.prompts, self.config, self.seed = every_n_steps, prompts, config, seed
        self.tokenizer, self.say = None, print
        self._last = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._last = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or step == trainer.max_steps
        if due and step != self._last and trainer.is_global_zero:
            self._last = step
            self._show(trainer, module, step)

    def _show(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        generator = torch.Generator(module.device).manual_seed(self.seed)
        texts = generate_text(module.model, self.tokenizer, self.prompts, self.config, generator=generator)
        for prompt, (text, *_) in zip(self.prompts, texts, strict=True):
            self.say(f"--- step {step} ---\n{prompt}{text}\n---")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    quoted = "\n".join(f"    {line}" for line in (prompt + text).splitlines())
                    logger.experiment.add_text(f"samples/{prompt.strip() or 'empty'}", quoted, step)
