"""The head that an objective trains in place of the language model's, and the labels that its outputs stand for."""

from typing import TYPE_CHECKING

from genai_pl.config.labels import Labels, read_labels
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.errors import ConfigError
from genai_pl.models import Model, WrappedDecoder
from genai_pl.modules import BaseModule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def set_objective_head(
    model: Model | WrappedDecoder,
    objective: type[BaseModule],
    data: RowsDataModule,
    tokenizer: "PreTrainedTokenizerBase",
) -> None:
    """Give the model the head of the objective, if it has one of its own, in place.

    An objective with labels takes those of the data; the tokenizer is completed for its rows, and truncates at the model's
    context, as pipelines that load the export ask it to. ConfigError for a model that transformers runs, whose head is its own.
    """
    if objective.head is None:
        return
    refuse_wrapped(model, objective)
    if not objective.labelled:
        model.set_head(objective.head)
        return
    labels = data.find_labels(known_labels(model, objective))
    data.prepare_tokenizer(tokenizer)
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_seq_len)
    model.set_head(objective.head, labels)


def refuse_wrapped(model: Model | WrappedDecoder, objective: type[BaseModule]) -> None:
    """ConfigError for a model that transformers runs, where the objective replaces the head."""
    if isinstance(model, WrappedDecoder):
        kind = "embeds texts" if objective.embeds else "scores texts"
        raise ConfigError(
            f"model=hf keeps its language-model head, and this objective {kind}: take init_from=FOLDER of a family that "
            "genai_pl has itself (docs/model_hf.md)"
        )


def known_labels(model: Model, objective: type[BaseModule]) -> Labels | None:
    """The labels of the model's head, if it has the objective's kind and names its outputs."""
    config = model.config
    return (
        read_labels(config.extra, config.n_labels)
        if config.head is objective.head and "id2label" in config.extra
        else None
    )
