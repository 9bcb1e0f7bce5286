"""Distillation: the frozen teacher reads what the student reads, and the student learns its predictions.

Three ways to be taught share one loss: the teacher runs beside the student; its likeliest tokens were written to disk once
(`teacher_cache.py`); or the student writes some of the completions that both then read (on-policy).
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError
from genai_pl.kernels.distillation import Weights, linear_distillation
from genai_pl.models import Model
from genai_pl.modules.base import Batch, Metrics, n_replicas
from genai_pl.modules.by_source import LOSSES, TARGETS
from genai_pl.modules.clm import CausalLMModule
from genai_pl.modules.columns import Column
from genai_pl.modules.rollout import generate_rollout
from genai_pl.modules.rollout_policy import rollout_policy
from genai_pl.modules.served_teacher import Server
from genai_pl.modules.teacher_cache import (
    Contents,
    TeacherCache,
    check_file,
    default_cache,
    digest_rows,
    fill_cache,
)
from genai_pl.modules.teachers import FileTeacher, RowTeacher
from genai_pl.objectives import IGNORED, SpecialTokens, masked_accuracy
from genai_pl.objectives.distillation import DistillCollator, join_batches, prompts_of_row


class TaughtRows(NamedTuple):
    """Rows that are learned from: batch (input_ids, labels, segment_ids), and weights (B, T) of their tokens' two losses.

    data_rows: numbers of the data's rows that are the first of them; completions of the student follow.
    """

    batch: Batch
    data_rows: Tensor
    cross_entropy: Tensor
    divergence: Tensor


class DistillModule(CausalLMModule):
    """alpha cross entropy + (1 - alpha) temperature^2 divergence from a teacher's predictions (Hinton et al. 2015).

    teacher: name of a model with the student's vocabulary; `use_teacher` gives what it predicts
    beta: divergence: 0 forward KL(teacher || student), 1 reverse KL, between generalized Jensen-Shannon (Agarwal et al. 2024)
    temperature: of both distributions
    alpha: weight of the cross entropy of the data's tokens
    top_k: write the teacher's likeliest tokens to disk before training, and free it; None: it runs beside the student
    teacher_cache: folder of these files, None for the default
    universal: compare sorted probabilities with a teacher of any tokenizer (Boizard et al. 2024) instead of the divergence
    server: how a teacher that is an address is asked
    student_fraction: share of rows whose completions the student writes itself
    max_new_tokens, sampling_temperature: of those completions
    text_prompt_tokens: tokens of a text that the student continues; a conversation is answered at its first answer
    """

    further_kinds = ("chat",)
    needs_teacher = True
    make_collator = DistillCollator
    divisible = False
    divides_sequences = False
    columns = (*CausalLMModule.columns, Column("train/divergence", "diverg.", "{:8.4f}"))

    def __init__(
        self,
        model: Model,
        *,
        vocabulary: SpecialTokens,
        seed: int,
        optimizer: object,
        schedule: object,
        teacher: str,
        beta: float,
        temperature: float,
        alpha: float,
        top_k: int | None,
        teacher_cache: str | None,
        universal: bool,
        server: Server,
        student_fraction: float,
        max_new_tokens: int,
        sampling_temperature: float,
        text_prompt_tokens: int,
    ) -> None:
        options = {"vocabulary": vocabulary, "seed": seed, "optimizer": optimizer, "schedule": schedule}
        super().__init__(model, **options, student_fraction=student_fraction)
        shares = {"beta": beta, "alpha": alpha, "student_fraction": student_fraction}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ConfigError(f"objective.{name} must be from 0 to 1, not {value}")
        if not temperature > 0:
            raise ConfigError(f"objective.temperature must be above 0, not {temperature}")
        if top_k is not None and not 0 < top_k < model.config.vocab_size:
            raise ConfigError(
                f"objective.top_k must be from 1 to {model.config.vocab_size - 1}, one below the vocabulary, not {top_k}"
            )
        if top_k is not None and student_fraction:
            raise ConfigError(
                "objective.student_fraction: what the student writes is not on disk; leave objective.top_k null"
            )
        if universal and (top_k is not None or student_fraction):
            raise ConfigError(
                "objective.universal=true: the teacher reads the text of the data as it trains; leave objective.top_k null "
                "and objective.student_fraction 0"
            )
        if min(max_new_tokens, text_prompt_tokens) < 1:
            raise ConfigError("objective.max_new_tokens and objective.text_prompt_tokens must be at least 1")
        self.longest_prompt = model.config.max_seq_len - max_new_tokens
        if student_fraction and self.longest_prompt < 1:
            raise ConfigError(
                f"objective.max_new_tokens={max_new_tokens} leaves no room for a prompt in the student's context of "
                f"{model.config.max_seq_len} tokens"
            )
        self.teacher_name, self.top_k, self.teacher_cache = teacher, top_k, teacher_cache
        self.universal, self.server = universal, server
        self.beta, self.temperature, self.alpha = beta, temperature, alpha
        self.student_fraction, self.text_prompt_tokens = student_fraction, text_prompt_tokens
        self.sampling = GenerationConfig(max_new_tokens=max_new_tokens, temperature=sampling_temperature)
        self.vocabulary = vocabulary
        self.teacher: RowTeacher  # from `use_teacher`; no submodule, and in no checkpoint

    def use_teacher(self, teacher: RowTeacher) -> None:
        """Set the teacher; ConfigError for one that cannot judge what the student writes."""
        if teacher.finite and self.student_fraction:
            raise ConfigError("objective.student_fraction: what the student writes is not on disk; set it to 0")
        self.teacher = teacher
        if teacher.context is not None:
            self.longest_prompt = min(self.longest_prompt, teacher.context - self.sampling.max_new_tokens)

    def on_fit_start(self) -> None:
        """Move the teacher to the device; with top_k, have it write what it knows of all training rows, and free it."""
        super().on_fit_start()
        self.teacher.to(self.device)
        data, context = self.trainer.datamodule, self.teacher.context
        if self.universal and data.kind != "text":
            raise ConfigError(
                "objective.universal=true: reads texts, not conversations, which each template writes otherwise"
            )
        too_long = context is not None and context < data.seq_len and not self.universal
        if too_long or (self.student_fraction and self.longest_prompt < 1):
            raise ConfigError(
                f"objective.teacher={self.teacher_name}: reads at most {context} tokens; lower data.seq_len "
                f"({data.seq_len}) and objective.max_new_tokens"
            )
        has_fixed_rows = not (self.source_names or data.streaming)
        if (self.top_k is not None or self.teacher.finite) and not has_fixed_rows:
            raise ConfigError("objective.top_k: a stream or mixture has no fixed rows; leave objective.top_k null")
        if isinstance(self.teacher, FileTeacher):
            check_file(self.teacher.cache, data.train_rows, seq_len=data.seq_len, temperature=self.temperature)
        elif self.top_k is not None:
            self.teacher = FileTeacher(self._written(self.top_k), vocab_size=self.model.config.vocab_size)

    def _written(self, top_k: int) -> TeacherCache:
        """The complete file of the teacher for the training rows, in the cache folder."""
        data, trainer, teacher = self.trainer.datamodule, self.trainer, self.teacher
        ranks = trainer.strategy.distributed_sampler_kwargs if n_replicas(trainer) > 1 else {}
        contents = Contents(
            len(data.train_rows),
            data.seq_len,
            top_k,
            digest_rows(data.train_rows, data.seq_len),
            teacher.fingerprint(str(trainer.precision)),
            self.teacher_name,
            float(self.temperature),
        )
        root = Path(self.teacher_cache) if self.teacher_cache else default_cache()
        folder = root / f"{contents.teacher}-{contents.digest[:16]}-k{top_k}"
        if ranks.get("rank", 0) == 0:
            TeacherCache.create(folder, contents, vocab_size=self.model.config.vocab_size)
        trainer.strategy.barrier()
        cache = TeacherCache(folder, writable=True)
        options = {"device": self.device, "batch_size": data.batch_size, "barrier": trainer.strategy.barrier}
        options |= {"rank": ranks.get("rank", 0), "n_ranks": n_replicas(trainer)}
        context = trainer.precision_plugin.forward_context
        fill_cache(cache, data.train_rows, self.collator, teacher, context=context, **options)
        return cache

    def step(self, batch: Batch) -> Metrics:
        """Sums over labelled tokens: of the loss in training, of the cross entropy in validation, so that runs compare."""
        if not self.training and self.teacher.finite:
            return super().step(batch)  # it knows nothing of these rows
        taught = self._taught_rows(batch)
        rows, model = taught.batch, self.model
        hidden, labels = model.to_head(self.hidden(rows)), rows["labels"]
        teacher, has_pair = self.teacher(rows, labels)
        if has_pair is not None:
            taught = taught._replace(divergence=taught.divergence * has_pair.view_as(labels))
        loss, losses = linear_distillation(
            hidden.flatten(0, 1),
            model.lm_head.weight,
            labels.flatten(),
            teacher,
            Weights(taught.cross_entropy.flatten(), taught.divergence.flatten()),
            beta=self.beta,
            temperature=self.temperature,
            bias=model.lm_head.bias,
            softcap=model.config.logit_softcap,
            ignore_index=IGNORED,
        )
        sums = self._sums(batch, taught, loss, losses)
        if has_pair is not None:
            sums["divergence"] = (losses[1] * has_pair).sum()
            sums["taught_tokens"] = (has_pair & (labels.flatten() != IGNORED)).sum().float()
        if not self.training:  # costs a second product with the head
            sums["correct"] = masked_accuracy(hidden, model.lm_head.weight, labels, bias=model.lm_head.bias)
        return sums

    def _taught_rows(self, batch: Batch) -> TaughtRows:
        """The rows of the data, and with student_fraction the student's completions instead of some of them."""
        labels = batch["labels"]
        if not (self.training and self.student_fraction):
            ones = torch.ones_like(labels, dtype=torch.float32)
            all_rows = torch.arange(len(labels), device=labels.device)
            return TaughtRows(batch, all_rows, self.alpha * ones, (1 - self.alpha) * ones)
        return self._with_completions(batch)

    def _with_completions(self, batch: Batch) -> TaughtRows:
        """Rows in which those of `on_policy` give way to the student's completions of their prompts.

        The divergence of a row's completions counts as much as the labels of the row would: a row weighs the same,
        whatever batch it is in and however long the completions are. Their cross entropy does not count.
        """
        # the student writes, on every rank, as sharded weights are gathered together
        batch = {"segment_ids": torch.ones_like(batch["input_ids"]), **batch}
        prompts, owners = [], []
        for row in batch["on_policy"].nonzero()[:, 0].tolist():
            parts = (batch[name][row] for name in ("input_ids", "labels", "segment_ids"))
            found = [p[-self.longest_prompt :] for p in prompts_of_row(*parts, text_tokens=self.text_prompt_tokens)]
            prompts, owners = prompts + found, owners + [row] * len(found)
        written = self._complete(prompts, int(batch["sample_seed"]))
        n_labels = (batch["labels"] != IGNORED).sum(1).float()  # (B,)
        kept = torch.ones(len(n_labels), dtype=torch.bool, device=n_labels.device)
        kept[owners] = False
        data = {name: batch[name][kept] for name in ("input_ids", "labels", "segment_ids")}
        shares = n_labels.new_zeros(0)
        if written is not None:
            # completions weigh together as much as their row has labels
            of_row = torch.tensor(owners, device=n_labels.device)
            counts = (written["labels"] != IGNORED).sum(1).float()
            totals = torch.zeros_like(n_labels).index_add_(0, of_row, counts)
            shares = (n_labels / totals.clamp(min=1))[of_row]
            data = join_batches(data, written, pad=self.vocabulary.pad)
        ones, width = n_labels.new_ones(int(kept.sum())), data["labels"].shape[1]
        cross_entropy = torch.cat([self.alpha * ones, 0 * shares])[:, None].expand(-1, width)
        divergence = (1 - self.alpha) * torch.cat([ones, shares])[:, None].expand(-1, width)
        return TaughtRows(data, kept.nonzero()[:, 0], cross_entropy, divergence)

    def _complete(self, prompts: list, seed: int) -> Batch | None:
        """Rows of prompts with the student's completions, whose tokens are labels; None without prompts."""
        ends = {*self.model.config.eos_token_ids, self.vocabulary.end} - {None}
        generator = torch.Generator(self.device).manual_seed(seed)
        with self.unsharded_model():
            if not prompts:
                return None
            options = {"generator": generator, "ends": ends, "pad": self.vocabulary.pad}
            with rollout_policy(self.model, self.sampling.max_new_tokens) as policy:
                return generate_rollout(policy, prompts, self.sampling, **options).batch

    def _sums(self, batch: Batch, taught: TaughtRows, loss: Tensor, losses: Tensor) -> Metrics:
        """Sums for the logs from the losses (2, B T) of tokens, those of the data's labels alone in the cross entropy."""
        labels, n = taught.batch["labels"], len(taught.data_rows)
        labelled = labels != IGNORED
        cross_entropy, divergence = losses.view(2, *labels.shape)  # 0 where there is no label
        of_data = cross_entropy[:n].sum(1)  # (n,)
        sums = {
            "loss": loss if self.training else of_data.sum(),
            "cross_entropy": of_data.sum(),
            "data_tokens": labelled[:n].sum().float(),
            "divergence": divergence.sum(),
            "taught_tokens": labelled.sum().float(),
            "bytes": self.n_bytes[labels[:n][labelled[:n]]].sum(),
        }
        if self.source_names:
            zeros = of_data.new_zeros(len(self.source_names), dtype=torch.float32)
            sources, counts = batch["sources"][taught.data_rows], labelled[:n].sum(1)
            sums |= {LOSSES: zeros.index_add(0, sources, of_data.float())}
            sums |= {TARGETS: zeros.index_add(0, sources, counts.float())}
        return sums

    def summarize(self, sums: Metrics, targets: Tensor) -> Metrics:
        """The loss; cross entropy, perplexity and bits per byte of the data's tokens; divergence of all that were taught.

        In validation the loss is the cross entropy. A step whose rows the student wrote all has no figures of the data.
        """
        if "divergence" not in sums:
            return super().summarize(sums, targets)
        metrics: Metrics = {}
        if (tokens := sums["data_tokens"]) > 0:
            of_data = {name: sums[name] for name in ("bytes", "correct") if name in sums}
            metrics = super().summarize({**of_data, "loss": sums["cross_entropy"]}, tokens)
            metrics |= {} if "correct" in sums else {"cross_entropy": metrics["loss"]}
        divergence = sums["divergence"] / sums["taught_tokens"].clamp(min=1)
        if self.universal:  # the share of tokens with a teacher
            metrics["paired"] = sums["taught_tokens"] / targets
        return {**metrics, "loss": sums["loss"] / targets, "divergence": divergence}
