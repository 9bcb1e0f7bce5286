"""Engines for tests: small random models, greedy settings, and a model that waits for the test."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from genai_pl.config.generation import GenerationConfig
from genai_pl.data import byte_tokenizer
from genai_pl.models import Decoder, ModelConfig, build_model
from genai_pl.serving.engine.engine import Engine
from genai_pl.serving.engine.request import TokenStream

TOKENIZER = byte_tokenizer()
SHAPES = {
    "gpt2": {"position": "learned", "norm": "layernorm", "bias": True},
    "llama": {"position": "rotary", "norm": "rmsnorm", "gated_mlp": True, "n_kv_head": 2},
    "qwen": {"position": "rotary", "norm": "rmsnorm", "qk_norm": True, "n_kv_head": 2, "window": 6, "full_every": 2},
    "alibi": {"position": "alibi"},
    "relative": {"position": "relative"},
    "longformer": {"position": "learned", "attention_kind": "window", "window": 4, "n_global": 2},
    "t5": {"position": "relative", "shape": "encoder_decoder"},
}
PROMPTS = ["The cat", "It was a dark and stormy night", "x", "Once upon a time there", "äö", "1, 2, 3, 4, 5"]


def build(**options: object) -> Decoder:
    torch.manual_seed(1)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": len(TOKENIZER), "max_seq_len": 64, "init_std": 0.3}
    return build_model(ModelConfig(**{**sizes, **options})).eval()


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text))


def greedy(n: int, **options: object) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=n, temperature=0.0, **options)


def text_of(stream: TokenStream) -> str:
    return "".join(output.text for output in stream)


@contextmanager
def running(model: nn.Module, **options: object) -> Iterator[Engine]:
    engine = Engine(model, TOKENIZER, **options)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(drain=False)


class Slow(nn.Module):
    """Forward hook that blocks each decode step until the test releases `gate`; `entered` is set when one waits."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.entered = threading.Semaphore(0), threading.Event()

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[1] == 1:
            self.entered.set()
            assert self.gate.acquire(timeout=20)
