"""LoRA (Hu et al. 2022), with rsLoRA, PiSSA and DoRA: a weight changes by the product of two thin matrices.

W' = W + s B A with A (R, in), B (out, R) and s = alpha / R, or alpha / sqrt(R) for rsLoRA (Kalajdzievski 2023). B starts at
zero, so the model starts as its base. PiSSA and DoRA are options of the same layer, since they change its start and its scale.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genai_pl.distributed.dtensor import local_shard
from genai_pl.errors import ConfigError
from genai_pl.kernels.grouped_linear import grouped_linear, grouped_rows
from genai_pl.models.experts import Dispatch, ExpertLinear
from genai_pl.peft.adapter import Adapter
from genai_pl.peft.adapter_layers import State, WeightAdapter, new_parameter, train_whole
from genai_pl.peft.quantize import quantize as quantize_blocks
from genai_pl.peft.targets import ModuleSite, listed, match

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
INITS = ("default", "pissa")


class LoRALinear(WeightAdapter):
    """base(x) + s B A x, (..., in) -> (..., out), with A (R, in) and B (out, R).

    DoRA learns the length of each row of the changed weight: W' = m (W + s B A) / |W + s B A| by rows (Liu et al. 2024, eq. 5).
    PiSSA starts A and B at the principal part of the weight and subtracts that part's output, kept in the buffers start_A and
    start_B: the base stays frozen as it is, instead of being overwritten by its residual, so the file holds plain LoRA.

    rank: R. alpha: numerator of s. dropout: probability, on the input of A. rslora, dora: as above.
    init: "default" (A uniform as nn.Linear, B zero) or "pissa".
    """

    def __init__(
        self,
        base: nn.Module,
        adapter: Adapter,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        rslora: bool,
        dora: bool,
        init: str,
    ) -> None:
        super().__init__(base, adapter)
        *experts, out_features, in_features = self.weight.shape
        self.rank, self.scaling = rank, alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = nn.Dropout(dropout)
        self.lora_A = new_parameter(self.weight, *experts, rank, in_features)
        self.lora_B = new_parameter(self.weight, *experts, out_features, rank)
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        if init == "pissa":
            self._start_at_principal_part()
        else:
            nn.init.kaiming_uniform_(self.lora_A.data.view(-1, in_features), a=math.sqrt(5))
        self.magnitude = nn.Parameter(self.norms()) if dora else None  # (out,)

    def forward(self, x: Tensor, *groups: Dispatch) -> Tensor:
        """groups: nothing, or the dispatch of a layer of experts, whose rows have a weight each."""
        y = self.base(x, *groups)
        if self.adapter.is_off:
            return y
        # plain LoRA: the scale is applied between A and B, where the tensor has only R columns
        scale = self._scale(x, *groups)
        dropped = self.dropout(x)
        if self.magnitude is None:
            return y + self._change(x, dropped, scale * self.scaling, *groups).to(y.dtype)
        # DoRA: (m / |W'| - 1) W x + m / |W'| s B A x is what must be added to the base's output
        norm_ratio = self._by_row(self.magnitude / self.norms(), *groups)  # no gradient through the norms (section 4.3)
        # W x without bias; under dropout both terms must see the same dropped input
        if self.training and self.dropout.p > 0.0:
            straight = self._product(dropped, self.weight.to(dropped.dtype), *groups)
        else:
            straight = y if self.bias is None else y - self._by_row(self.bias, *groups)
        change = (norm_ratio - 1) * straight + norm_ratio * self._change(x, dropped, self.scaling, *groups)
        return y + (scale * change).to(y.dtype)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x W^T; under tensor parallelism a process holds some rows or columns of A or B."""
        return F.linear(x, local_shard(weight))

    def _by_row(self, values: Tensor) -> Tensor:
        """Values by output channel, as they multiply the output."""
        return values

    def _scale(self, x: Tensor) -> Tensor | float:
        """The adapter's weight, by row of the batch where rows differ."""
        return self.adapter.scale(x)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R) whose product times `scaling` is the whole change of the weight.

        For PiSSA the initial product is subtracted by stacking, so R is twice the rank, and the result is plain LoRA.
        """
        if self.start_A is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.start_A], dim=-2), torch.cat([self.lora_B, -self.start_B], dim=-1)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Lengths (out,) of the rows of the changed weight, without gradient."""
        A, B = self.factors()
        return (self.weight.to(A.dtype) + self.scaling * (B @ A)).norm(dim=-1)

    def merged(self, state: State) -> State:
        A, B = self.factors()
        weight, share = state["weight"], self.adapter.weight
        change = self.scaling * (B @ A)
        if self.magnitude is None:
            return {**state, "weight": weight + share * change}
        scale = (self.magnitude / self.norms())[..., None]
        new = {**state, "weight": weight + share * ((scale - 1) * weight + scale * change)}
        if self.bias is not None:
            # `forward` scales base(x) - bias, so it scales what adapters inside have added to the bias
            new["bias"] = state["bias"] + share * (scale[..., 0] - 1) * (state["bias"] - self.bias)
        return new

    def _change(self, x: Tensor, dropped: Tensor, factor: Tensor | float, *groups: Dispatch) -> Tensor:
        """factor * (B A dropped - B0 A0 x), with the factor applied to the R columns between the two products."""

        def through(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
            return self._product(self._product(self._cast(x), A, *groups) * factor, B, *groups)

        change = through(dropped, self.lora_A, self.lora_B)
        return change if self.start_A is None else change - through(x, self.start_A, self.start_B)

    def _cast(self, x: Tensor) -> Tensor:
        """x in the dtype of A; under autocast, F.linear casts by itself."""
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.lora_A.dtype)

    @torch.no_grad()
    def _start_at_principal_part(self) -> None:
        """Set A and B so that s B A is the part of the weight with the R largest singular values (Meng et al. 2024, eq. 2, 3)."""
        U, S, Vh = torch.linalg.svd(self.weight.to(self.lora_A.dtype), full_matrices=False)
        if self.rank > S.shape[-1]:
            shape = " x ".join(map(str, self.weight.shape[-2:]))
            raise ConfigError(f"peft.init=pissa: peft.rank={self.rank} is more than a weight of {shape} has")
        root = (S[..., : self.rank] / self.scaling).sqrt()
        self.lora_A.copy_(root[..., None] * Vh[..., : self.rank, :])
        self.lora_B.copy_(U[..., : self.rank] * root[..., None, :])
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()


class ExpertLoRA(LoRALinear):
    """LoRA on a tensor of experts (E, out, in), with A (E, R, in) and B (E, out, R): a change for each expert."""

    def _product(self, x: Tensor, weight: Tensor, dispatch: Dispatch) -> Tensor:
        """x W_e^T, each row by the matrix of its expert."""
        return grouped_linear(x, local_shard(weight), dispatch.ends)

    def _by_row(self, values: Tensor, dispatch: Dispatch) -> Tensor:
        """Values (E, out) by expert, as they multiply the sorted rows."""
        return grouped_rows(values, dispatch.experts)

    def _scale(self, x: Tensor, dispatch: Dispatch) -> Tensor | float:
        """The adapter's weight; where rows of the batch differ, that of the row that each sorted row came from."""
        rows = self.adapter.rows
        return self.adapter.weight if rows is None else rows.to(x.dtype)[dispatch.batch_rows][:, None]


def lora(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    init: str = "default",
    target_modules: str | Sequence[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Sequence[str] | None = None,
    quantize: str | None = None,
) -> nn.Module:
    """The model, frozen, with a LoRALinear around each target; None targets q_proj, k_proj, v_proj and o_proj.

    Experts are targets by name only (gate_proj, up_proj, down_proj, or experts.up_proj where a dense layer has one too).

    rank, alpha, dropout, rslora, dora, init: see `LoRALinear`; rank_pattern and alpha_pattern, {name: value}, override the first
    two for the targets of that name. target_modules: see `targets.match`. modules_to_save: layers trained as full copies.
    quantize: "nf4" or "int8" for the frozen linear layers of the blocks (QLoRA), or None.
    """
    # options are checked and stored before the model changes
    ranks, alphas = dict(rank_pattern or {}), dict(alpha_pattern or {})
    _check({rank, *ranks.values()}, {alpha, *alphas.values()}, dropout=dropout, init=init)
    common = {"dropout": dropout, "rslora": rslora, "dora": dora, "init": init}
    names = {"target_modules": listed(target_modules), "modules_to_save": listed(modules_to_save)}
    options = {"rank": rank, "alpha": alpha, **common, **names, "rank_pattern": ranks, "alpha_pattern": alphas}
    options["quantize"] = quantize
    if quantize is not None:
        quantize_blocks(model, kind=quantize, keep=names["modules_to_save"] or [])
    # freeze the base, then wrap: parameters made afterwards are trainable
    adapter = Adapter("dora" if dora else "lora", options)
    targets = match(model, target_modules, default=TARGETS, kinds=(nn.Linear, ExpertLinear))
    rank_of = partial(_by_pattern, "rank_pattern", ranks, targets, rank)
    alpha_of = partial(_by_pattern, "alpha_pattern", alphas, targets, alpha)
    model.requires_grad_(False)
    for site in targets:
        layer = ExpertLoRA if isinstance(site.inner, ExpertLinear) else LoRALinear
        site.replace(layer(site.module, adapter, rank=rank_of(site), alpha=alpha_of(site), **common))
    train_whole(model, names["modules_to_save"] or [], adapter)
    return model


def _by_pattern(
    option: str, pattern: dict[str, float], targets: list[ModuleSite], default: float, site: ModuleSite
) -> float:
    """The value of a site: that of the first pattern name it is called by, else the default; ConfigError for unused names."""
    for name in pattern:
        if not any(target.is_called(name) for target in targets):
            raise ConfigError(f"peft.{option}: no target is called {name}")
    return next((value for name, value in pattern.items() if site.is_called(name)), default)


def _check(ranks: set[int], alphas: set[float], *, dropout: float, init: str) -> None:
    if any(not isinstance(rank, int) or rank < 1 for rank in ranks):
        raise ConfigError(f"peft.rank must be a whole number above 0, not {min(ranks)}")
    if any(alpha <= 0 for alpha in alphas):
        raise ConfigError(f"peft.alpha must be above 0, not {min(alphas)}")
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"peft.dropout must be in [0, 1), not {dropout}")
    if init not in INITS:
        raise ConfigError(f"peft.init={init} is not one of {', '.join(INITS)}")
