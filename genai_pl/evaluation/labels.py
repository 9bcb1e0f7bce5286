"""Labels of texts: outputs of a head for labels, probabilities by its problem type, and the metrics of a whole data set."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genai_pl.config.labels import MULTI, REGRESSION, Labels, read_labels
from genai_pl.data.word_tokens import tokenize_words
from genai_pl.evaluation.embeddings import BATCH_TOKENS, TokenRows, padded
from genai_pl.evaluation.metrics import Metrics, with_interval
from genai_pl.evaluation.preferences import correlation
from genai_pl.models import Model
from genai_pl.models.pooling import label_scores
from genai_pl.objectives.classify import confusion_matrix, counts_of_confusion, label_counts, macro_f1
from genai_pl.objectives.collate import pad_rows
from genai_pl.objectives.token_classify import entity_counts, f1_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Ranked(NamedTuple):
    """Reciprocal rank of the first relevant document of a query, and whether it is the first of all."""

    reciprocal_rank: float
    is_first: bool


def is_reward_model(model: Model) -> bool:
    """True for one output that is a reward: its text ends in an end token, and its number is no probability."""
    config = model.config
    if not (config.head.scores and config.is_reward):
        return False
    name = read_labels(config.extra, 1).names[0] if "id2label" in config.extra else "reward"
    return name == "reward" or (model.causal and name == "LABEL_0")


@torch.inference_mode()
def label_logits(
    model: Model,
    rows: Mapping[str, TokenRows],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_batch: Callable[[int], object] | None = None,
) -> Tensor:
    """The outputs (N, K) of the head for N rows of `input_ids` and perhaps `token_type_ids`, float32 on the CPU."""
    logits = torch.empty(len(rows["input_ids"]), model.config.n_labels)
    has_types = "token_type_ids" in rows and model.config.n_token_types > 1
    for batch, input_ids, segment_ids in padded(model, rows["input_ids"], batch_tokens):
        types = {}
        if has_types:
            types = {"token_type_ids": pad_rows([rows["token_type_ids"][n] for n in batch], 0).to(input_ids)}
        logits[batch] = label_scores(model, input_ids, segment_ids, 1, **types)[:, 0].cpu()
        if on_batch is not None:
            on_batch(len(batch))
    return logits


@torch.inference_mode()
def tag_words(
    model: Model,
    tokenizer: "PreTrainedTokenizerBase",
    sentences: Sequence[Sequence[str]],
    *,
    max_length: int,
    batch_tokens: int = BATCH_TOKENS,
    on_batch: Callable[[int], object] | None = None,
) -> list[list[str]]:
    """The tag of each word of each sentence, by a head for tokens; words beyond max_length tokens are O."""
    names = read_labels(model.config.extra, model.config.n_labels).names
    encoded = tokenize_words({"tokens": [list(words) for words in sentences]}, tokenizer, max_length)
    tags = [["O"] * len(words) for words in sentences]
    for batch, input_ids, segment_ids in padded(model, encoded["input_ids"], batch_tokens):
        best = model.label_logits(model.features(input_ids, segment_ids)).argmax(-1).tolist()
        for n, row in zip(batch, best, strict=True):
            for word, label in zip(encoded["words"][n], row, strict=False):  # the row may be padded
                if word >= 0:
                    tags[n][word] = names[label]
        if on_batch is not None:
            on_batch(len(batch))
    return tags


def tag_metrics(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> Metrics:
    """Precision, recall and F1 of entities (seqeval's), and the accuracy of tags with its interval."""
    found = torch.from_numpy(sum(map(entity_counts, predicted, true), np.zeros(3))).double()
    hits = [a == b for ours, theirs in zip(predicted, true, strict=True) for a, b in zip(ours, theirs, strict=True)]
    f1 = {name: value.item() for name, value in f1_of(*found.unbind()).items()}
    return {**f1, **with_interval("accuracy", sum(hits) / len(hits), len(hits))}


def probabilities(logits: Tensor, labels: Labels) -> Tensor:
    """Probabilities (N, K) of outputs (N, K), as transformers' pipelines compute them; the numbers themselves of a regression."""
    return {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid, "none": lambda x: x}[labels.activation](
        logits
    )


def describe_labels(row: Tensor, labels: Labels) -> dict[str, object]:
    """What one row of probabilities (K,) says, by name: label and probabilities, all labels above one half, or numbers."""
    named = dict(zip(labels.names, row.tolist(), strict=True))
    if labels.problem_type == REGRESSION or len(named) == 1:
        return {"score": row.item()} if len(named) == 1 else {"scores": named}
    if labels.problem_type == MULTI:
        return {"labels": [name for name, p in named.items() if p > 0.5], "probabilities": named}
    return {"label": max(named, key=named.__getitem__), "probabilities": named}


def label_metrics(logits: Tensor, targets: Tensor, labels: Labels) -> Metrics:
    """Metrics of outputs (N, K) against targets as `data.labels.encode_label` makes them, (N, 1 or K).

    accuracy (all labels of a row right) with Wilson's 95 % interval and macro F1; of numbers mse and Pearson's correlation.
    """
    n = len(logits)
    if labels.problem_type == REGRESSION:
        error = (logits.double() - targets.double()).square().mean().item()
        return {"mse": error, "pearson": correlation(logits.double().flatten(), targets.double().flatten())}
    if labels.problem_type == MULTI:
        predicted = logits > 0
        hits, counts = (predicted == targets.bool()).all(1), label_counts(predicted, targets)
    else:
        predicted, true = logits.argmax(1), targets[:, 0].long()
        hits, counts = predicted == true, counts_of_confusion(confusion_matrix(predicted, true, logits.shape[1]))
    return {**with_interval("accuracy", hits.double().mean().item(), n), "f1": macro_f1(counts).item()}


def rank(scores: Sequence[float], relevant: Sequence[bool]) -> Ranked:
    """The place of the best relevant document of a query; documents of equal scores count against it.

    >>> rank([0.1, 0.9, 0.5], [False, False, True])
    Ranked(reciprocal_rank=0.5, is_first=False)
    """
    best = max(score for score, wanted in zip(scores, relevant, strict=True) if wanted)
    before = sum(score >= best for score, wanted in zip(scores, relevant, strict=True) if not wanted)
    return Ranked(1 / (1 + before), before == 0)


def ranking_metrics(queries: Sequence[Ranked]) -> Metrics:
    """Mean reciprocal rank, and recall@1 (the share of queries whose first document is relevant) with its interval."""
    n = len(queries)
    recall = sum(query.is_first for query in queries) / n
    return {"mrr": sum(query.reciprocal_rank for query in queries) / n, **with_interval("recall@1", recall, n)}
