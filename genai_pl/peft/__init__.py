"""Parameter-efficient fine-tuning: functions from a model to the same model with adapters around its layers.

A method (`lora`, `ia3`, `prefix`, ...) freezes the model and wraps or adds modules that all refer to one `Adapter`, the switch
for the method's effect. Several adapters may wrap one layer. `merge` turns weight adapters into plain weights; `save_adapter`
and `load_adapter` use PEFT's file layout. Names: adapter.py switch, adapter_layers.py layers around a weight, targets.py
which modules are wrapped, io/ files.
"""

from genai_pl.peft.adapter import Adapter, AdapterLayer, RowWeights, adapters_disabled, adapters_of
from genai_pl.peft.adapter_layers import tie_weights
from genai_pl.peft.bitfit import bitfit
from genai_pl.peft.bottleneck import bottleneck
from genai_pl.peft.ia3 import ia3
from genai_pl.peft.io.folder import METHODS, add_label_head, load_adapter, read_method, save_adapter
from genai_pl.peft.lora import lora
from genai_pl.peft.merge import merge
from genai_pl.peft.prefix import prefix
from genai_pl.peft.prompt import prompt
from genai_pl.peft.quantize import quantize
from genai_pl.peft.remove import remove_adapter
from genai_pl.peft.share_base import base_tensors, hold_base_in_16_bits, share_frozen
from genai_pl.peft.targets import describe

__all__ = [
    "Adapter",
    "AdapterLayer",
    "METHODS",
    "RowWeights",
    "add_label_head",
    "adapters_disabled",
    "adapters_of",
    "base_tensors",
    "bitfit",
    "bottleneck",
    "describe",
    "hold_base_in_16_bits",
    "ia3",
    "load_adapter",
    "lora",
    "merge",
    "prefix",
    "prompt",
    "quantize",
    "read_method",
    "remove_adapter",
    "save_adapter",
    "share_frozen",
    "tie_weights",
]
