"""Attention kinds for long rows, in time and memory that are not quadratic in S.

Each is a module that is called (q, k, v, mask, options) as `attention_with` is. Windows are exact; Linformer, Performer and
Reformer approximate full attention. All refuse, with the option to change, what they do not compute.
"""

from genai_pl.kernels.efficient.linformer import Linformer
from genai_pl.kernels.efficient.performer import Performer
from genai_pl.kernels.efficient.reformer import Reformer
from genai_pl.kernels.efficient.windowed import WindowAttention

__all__ = ["Linformer", "Performer", "Reformer", "WindowAttention"]
