"""What an attention kind cannot do, said in one line that names the option and the fix."""

from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.kernels.mask import AttentionMask

FIXES = {
    "window": ("a window", "model.window=null"),
    "order": ("permutation masks", "model.attention_kind=full"),
    "prefix": ("a bidirectional prefix", "model.attention_kind=full"),
    "bias": ("biases of the scores", "model.position=rotary"),
    "alibi": ("ALiBi", "model.position=rotary"),
    "softcap": ("a softcap", "model.softcap=null"),
    "dropout": ("attention dropout", "model.dropout=0"),
}


def refuse(
    kind: str,
    mask: AttentionMask,
    *,
    window: int | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
) -> None:
    """ConfigError if any of these is given, or if the mask has an order, a prefix or a window other than `window`."""
    given = {
        "window": mask.window not in (None, window),
        "order": mask.order is not None,
        "prefix": mask.prefix is not None,
        "bias": bias is not None,
        "alibi": alibi is not None,
        "softcap": softcap is not None,
        "dropout": dropout_p > 0.0,
    }
    for name, is_given in given.items():
        if is_given:
            what, fix = FIXES[name]
            raise ConfigError(f"model.attention_kind={kind} has no {what}: set {fix}{_or_full(fix)}")


def _or_full(fix: str) -> str:
    return "" if fix == "model.attention_kind=full" else ", or model.attention_kind=full"
