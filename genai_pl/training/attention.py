"""Attention of a run: the probe on GPUs with what it needs to know of configuration, model and data."""

from collections.abc import Mapping

import lightning as L
from omegaconf import DictConfig

from genai_pl.callbacks import AttentionProbe, products_dtype
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.kernels.attention_probe import ProbeShape
from genai_pl.models.attention_choice import probe_shape
from genai_pl.modules import BaseModule
from genai_pl.training.precision import Precision


def attention_probe(
    config: DictConfig,
    precision: Precision,
    module: BaseModule,
    data: RowsDataModule,
    callbacks: Mapping[str, L.Callback],
    *,
    stored: object,
) -> AttentionProbe:
    """The callback that chooses the attention of a run on GPUs; rows are as long as the data module makes them.

    callbacks: by their names in `Run`; checkpoints keep the choice, the console prints it. stored: the order in the
    checkpoint of a resumed run.
    """

    def shape() -> ProbeShape | None:
        options = {"length": data.seq_len, "backward": True, "compiled": config.compile is True}
        return probe_shape(module.model, products_dtype(precision.lightning), **options)

    def keep(backends: tuple[str, ...]) -> None:
        callbacks["checkpoints"].contents["attention"] = list(backends)

    return AttentionProbe(shape, stored=stored, keep=keep, say=callbacks["console"].say)
