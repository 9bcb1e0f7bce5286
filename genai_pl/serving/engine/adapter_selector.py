"""Adapter selection: which adapter each row of the next batch uses."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from genai_pl.data.generation_defaults import end_token_ids, read_generation_defaults
from genai_pl.peft import Adapter, adapters_of, load_adapter


class AdapterSelector:
    """The adapters that requests name, loaded into one model; adapters that the model has already stay as they are.

    model: the base, changed in place: every adapter becomes part of it with weight 0 or 1
    folders: adapter folder by the name that requests use

    All adapters stay in memory at once, with weight 0. A pass of the model runs inside `selected`, which gives each its weight,
    one per batch row, so requests for different adapters share a decode step (as in S-LoRA, Sheng et al. 2023, without its
    paging of adapter weights).
    """

    def __init__(self, model: nn.Module, folders: Mapping[str, str]) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.own_end_tokens: dict[str, list[int]] = {}  # from the generation_config.json of each adapter's folder
        self.config = model.config
        self.device = next(model.parameters()).device
        for name, folder in folders.items():
            load_adapter(model, Path(folder))
            self.adapters[name] = adapters_of(model)[-1]
            self.adapters[name].weight = 0.0
            self.own_end_tokens[name] = end_token_ids(read_generation_defaults(Path(folder)))
        model.to(self.device).eval()

    def end_tokens(self, name: str | None) -> set[int]:
        """Token ids that end a sequence: those of the model, and those of the adapter `name` (None: no adapter)."""
        own = self.own_end_tokens.get(name, ())
        return {*self.config.eos_token_ids, *(i for i in own if 0 <= i < self.config.vocab_size)}

    @contextmanager
    def selected(self, names: Sequence[str | None]) -> Iterator[None]:
        """Context manager: inside, one adapter per batch row is active, by name, None for the base alone.

        It is PEFT's set_adapter for every row: the active adapter of a row has weight 1, the others 0.
        """
        for name, adapter in self.adapters.items():
            weights = [float(row_name == name) for row_name in names]
            alike = len(set(weights)) == 1  # one number is faster than a tensor with one per row
            adapter.weight = weights[0]
            adapter.rows = None if alike else torch.tensor(weights, device=self.device)
        try:
            yield
        finally:
            for adapter in self.adapters.values():
                adapter.weight, adapter.rows = 0.0, None
