"""The kernels of others as their own launchers run them, for `kernels_static.py`; none where they are not installed."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from triton import JITFunction

from genai_pl.kernels.flash.launch import Launch

B, H, T = 2, 16, 4096


def flash_attn_launches(folder: Path) -> Iterator[tuple[str, Launch]]:
    """Causal attention of flash_attn/flash_attn_triton.py (flash-attn 2), whose sources pip downloads; written to a folder."""
    module = _flash_attn_triton(folder)
    if module is None:
        return
    for D in (64, 128):
        q, k, v, o = (torch.empty(B, T, H, D, dtype=torch.bfloat16, device="meta") for _ in range(4))
        rows = torch.empty(B, H, T, device="meta")
        constants = {"BIAS_TYPE": "none", "IS_CAUSAL": True, "BLOCK_HEADDIM": D, "BLOCK_M": 128, "BLOCK_N": 128}
        constants |= {"EVEN_M": True, "EVEN_N": True, "EVEN_HEADDIM": True}
        sizes = {"nheads": H, "seqlen_q": T, "seqlen_k": T, "seqlen_q_rounded": T, "headdim": D, "softmax_scale": 0.1}
        sizes |= {"CACHE_KEY_SEQLEN_Q": T // 32, "CACHE_KEY_SEQLEN_K": T // 32}
        strides = _strides(q) | {"stride_bb": 0, "stride_bh": 0, "stride_bm": 0}
        forward = {"Q": q, "K": k, "V": v, "Bias": v, "Out": o, "Lse": rows, "TMP": rows} | sizes | strides | constants
        yield f"flash-attn forward d{D} causal", _launch(module._fwd_kernel, forward, 4 if D <= 64 else 8)
        gradients = {"DO": o, "DQ": q.float(), "DK": k, "DV": v, "LSE": rows, "D": rows, "SEQUENCE_PARALLEL": True}
        backward = {"Q": q, "K": k, "V": v, "Bias": v} | gradients | sizes | strides | constants
        yield f"flash-attn backward d{D} causal", _launch(module._bwd_kernel, backward, 8)


def liger_launches(V: int, *, hip: bool) -> Iterator[tuple[str, Launch]]:
    """The softmax cross entropy of Liger Kernel, bf16, without options."""
    if importlib.util.find_spec("liger_kernel") is None:
        return
    from liger_kernel.ops.cross_entropy import MAX_FUSED_SIZE, liger_cross_entropy_kernel

    logits, losses = torch.empty(1024, V, dtype=torch.bfloat16, device="meta"), torch.empty(1024, device="meta")
    arguments = {
        "X_ptr": logits, "X_stride": V, "Y_ptr": losses.long(), "Y_stride": 1, "weight_ptr": None, "loss_ptr": losses,
        "z_loss_ptr": None, "loss_stride": 1, "token_accuracy_ptr": None, "token_accuracy_stride": 0,
        "predicted_tokens_ptr": None, "predicted_tokens_stride": 0, "n_cols": V, "n_non_ignore": 1000,
        "sum_non_ignore_weight": 1000, "weight_sum": 0.0, "ignore_index": -100, "lse_square_scale": 0.0,
        "label_smoothing": 0.0, "reduction": "mean", "softcap": None, "RETURN_Z_LOSS": False,
        "RETURN_TOKEN_ACCURACY": False, "RETURN_PREDICTED_TOKENS": False, "BLOCK_SIZE": MAX_FUSED_SIZE,
        "HAS_WEIGHT": False, "HAS_SOFTCAPPING": False, "HAS_GRADIENTS": True,
    }  # fmt: skip
    yield "Liger cross entropy bf16", _launch(liger_cross_entropy_kernel, arguments, 16 if hip else 32)


def _launch(kernel: Any, arguments: dict[str, Any], num_warps: int) -> Launch:
    while not isinstance(kernel, JITFunction):  # autotuning and heuristics: `arguments` has what they would choose
        kernel = kernel.fn
    args = tuple(arguments[parameter.name] for parameter in kernel.params)
    return Launch("peer", kernel, (), args, {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": True})


def _strides(x: Tensor) -> dict[str, int]:
    """Of every tensor, since all have one shape."""
    names = ("q", "k", "v", "o", "do", "dq", "dk", "dv")
    kinds = (("b", x.stride(0)), ("h", x.stride(2)), ("m", x.stride(1)), ("n", x.stride(1)))
    return {f"stride_{name}{kind}": stride for name in names for kind, stride in kinds}


def _flash_attn_triton(folder: Path) -> ModuleType | None:
    """That one file, since the package around it wants its CUDA extension; `trans_a` and `trans_b` left Triton in 3.0."""
    package = importlib.util.find_spec("flash_attn")
    if package is None:
        return None
    code = Path(package.origin).with_name("flash_attn_triton.py").read_text()
    code = re.sub(r"tl\.dot\((.+), (\w+), trans_a=True\)", r"tl.dot(tl.trans(\1), \2)", code)
    code = re.sub(r"tl\.dot\((.+), (\w+), trans_b=True\)", r"tl.dot(\1, tl.trans(\2))", code)
    path = folder / "flash_attn_triton.py"  # Triton reads kernels from files
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("flash_attn_triton", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
