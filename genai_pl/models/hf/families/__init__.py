"""Families of Hugging Face models as tables in our terms, read in both directions.

One `Family` per model_type maps its keys of config.json to fields of `ModelConfig`, and its tensors to ours.
A new family is a new table; the code that reads and writes stays as it is (docs/extending.md has an example).
"""

from genai_pl.models.hf.families.decoders import GPT2, LLAMA, MISTRAL, QWEN2, QWEN3
from genai_pl.models.hf.families.encoders import ALBERT, BERT, ROBERTA
from genai_pl.models.hf.families.family import ACTIVATIONS, Family, Weight
from genai_pl.models.hf.families.gemma3 import GEMMA3
from genai_pl.models.hf.families.gpt_oss import GPT_OSS
from genai_pl.models.hf.families.ministral import MINISTRAL
from genai_pl.models.hf.families.mixtures import MIXTURES
from genai_pl.models.hf.families.modernbert import MODERNBERT
from genai_pl.models.hf.families.t5 import T5
from genai_pl.models.hf.families.xlnet import XLNET

FAMILIES = [
    GPT2,
    LLAMA,
    MISTRAL,
    MINISTRAL,
    QWEN2,
    QWEN3,
    GEMMA3,
    *MIXTURES,
    GPT_OSS,
    BERT,
    ROBERTA,
    ALBERT,
    MODERNBERT,
    T5,
    XLNET,
]  # a plugin appends its own

__all__ = ["ACTIVATIONS", "FAMILIES", "Family", "Weight"]
