"""Adapter selection: which adapter each row of the next batch uses, while adapters come and go."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from genai_pl.data.generation_defaults import end_token_ids, read_generation_defaults
from genai_pl.peft import Adapter, adapters_of, load_adapter, remove_adapter
from genai_pl.serving.engine.request import EngineObserver


class AdapterSelector:
    """The adapters that requests name, loaded into one model; adapters that the model has already stay as they are.

    model: the base, changed in place: every adapter becomes part of it with weight 0 or 1
    folders: adapter folder by the name that requests use
    is_fixed: no adapter is loaded later
    observer: told how many there are

    All adapters stay in memory at once, with weight 0. A pass of the model runs inside `selected`, which gives each its weight,
    one per batch row, so requests for different adapters share a decode step (as in S-LoRA, Sheng et al. 2023, without its
    paging of adapter weights).

    leaving: names of adapters that no new request gets, and that go once nothing uses them. n_users: by name, those outside of
    the engine, such as an HTTP request whose prompt is still tokenized. The engine's lock guards both; the other attributes
    and the model are changed by the thread that runs the passes alone.
    """

    def __init__(
        self,
        model: nn.Module,
        folders: Mapping[str, str],
        *,
        is_fixed: bool = True,
        observer: EngineObserver | None = None,
    ) -> None:
        self.model, self.is_fixed, self.observer = model, is_fixed, observer or EngineObserver()
        self.adapters: dict[str, Adapter] = {}
        self.own_end_tokens: dict[str, list[int]] = {}  # from the generation_config.json of each adapter's folder
        self.leaving: set[str] = set()
        self.n_users: Counter[str] = Counter()
        self.config = model.config
        self.device = next(model.parameters()).device
        for name, folder in folders.items():
            self.load(name, Path(folder))
        model.to(self.device).eval()
        self._report()

    def load(self, name: str, folder: Path) -> None:
        """Load one more adapter; if it cannot be loaded the model is as before, and the exception says why."""
        before = {id(adapter) for adapter in adapters_of(self.model)}
        own = end_token_ids(read_generation_defaults(folder))
        try:
            with torch.inference_mode(False):  # parameters as those of a model that is loaded at the start
                load_adapter(self.model, folder)
                self.model.to(self.device).eval()
        except BaseException:
            for adapter in adapters_of(self.model):
                if id(adapter) not in before:
                    remove_adapter(self.model, adapter)
            raise
        adapter = adapters_of(self.model)[-1]
        adapter.weight = 0.0
        self.adapters = {**self.adapters, name: adapter}  # another dict: other threads read this one
        self.own_end_tokens[name] = own
        self._report()

    def unload(self, name: str) -> Adapter:
        """Take an adapter out of the model; returns it."""
        adapter = self.adapters[name]
        self.adapters = {other: found for other, found in self.adapters.items() if other != name}
        self.own_end_tokens.pop(name)
        self.leaving.discard(name)
        remove_adapter(self.model, adapter)
        self._report()
        return adapter

    def retire(self, name: str) -> None:
        """Let an adapter leave; whoever holds the engine's lock may call it."""
        self.leaving.add(name)
        self._report()

    def _report(self) -> None:
        self.observer.adapters_changed(len(self.adapters) - len(self.leaving), len(self.leaving))

    def unused(self, in_use: Collection[str | None]) -> list[str]:
        """Names of leaving adapters that nothing uses any more. in_use: those of the engine's requests."""
        return [name for name in self.leaving if not self.n_users[name] and name not in in_use]

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
