"""Attention kinds for long rows: each is a module called as `attention` is, (q, k, v, mask, options)."""

from genai_pl.kernels.efficient.linformer import Linformer
from genai_pl.kernels.efficient.performer import Performer
from genai_pl.kernels.efficient.reformer import Reformer
from genai_pl.kernels.efficient.windowed import WindowAttention

__all__ = ["Linformer", "Performer", "Reformer", "WindowAttention"]
