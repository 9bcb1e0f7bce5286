"""How families of Hugging Face models are written in our terms: tables, read in both directions."""

from genai_pl.models.hf.families.decoders import GPT2, LLAMA, MISTRAL, QWEN2, QWEN3
from genai_pl.models.hf.families.encoders import ALBERT, BERT, ROBERTA
from genai_pl.models.hf.families.family import ACTIVATIONS, Family, Weight
from genai_pl.models.hf.families.gemma3 import GEMMA3
from genai_pl.models.hf.families.t5 import T5
from genai_pl.models.hf.families.xlnet import XLNET

FAMILIES = [GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, BERT, ROBERTA, ALBERT, T5, XLNET]  # others may follow

__all__ = ["ACTIVATIONS", "FAMILIES", "Family", "Weight"]
