"""ONNX models: a folder of graphs, run by ONNX Runtime, with the interface of our decoders.

Decoding and serving call `features`, `logits` and `new_cache` and see no difference. The graph computes on the CPU; tensors
go in and out without a copy where they are there already.
"""

import hashlib
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from genai_pl.config.enums import Shape
from genai_pl.config.model import ModelConfig
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models.hf.config import read_config
from genai_pl.models.onnx.export import DECODER, ENCODER, MODEL, past_names, source_names

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


class OnnxCache:
    """Past keys and values as the graph returned them, with the interface of `KVCache`.

    max_length: tokens that a row may have. past: key and value (B, K, P, D) of each layer in turn, of length 0 at first.
    `mask` (B, P) is 0 where padding is.
    """

    def __init__(self, batch_size: int, max_length: int, past: list[Tensor]) -> None:
        self.max_length, self.length = max_length, 0
        self.past = past
        self.mask = torch.ones(batch_size, 0, dtype=torch.long)

    @property
    def n_text(self) -> int:
        """Tokens that the cache holds."""
        return self.length

    def seen(self, segment_ids: Tensor | None, n_new: int) -> Tensor:
        """The mask (B, P + T) with n_new tokens, which count as text or padding like the last ones if no ids are given."""
        if self.length + n_new > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, {self.length + n_new} were given")
        if segment_ids is None:
            segment_ids = self.mask[:, -1:] if self.length else torch.ones(len(self.mask), 1, dtype=torch.long)
        return torch.cat([self.mask, segment_ids.cpu().long().expand(-1, n_new)], dim=1)

    def keep_rows(self, rows: Tensor) -> None:
        """Reorder, repeat or drop rows of the batch: row i of the result was row rows[i], (B',) indices."""
        rows = rows.cpu()
        self.past = [tensor[rows] for tensor in self.past]
        self.mask = self.mask[rows]

    reorder = keep_rows

    def rewind(self, n: int) -> None:
        """Forget the last n tokens, fewer than the cache holds."""
        self.length -= n
        self.past = [tensor[:, :, : self.length].contiguous() for tensor in self.past]
        self.mask = self.mask[:, : self.length]


class OnnxDecoder(nn.Module):
    """A decoder graph. `features` are logits already; rows are one text each, padded on the left where segment_ids is 0.

    config: sizes, from the folder. session: ONNX Runtime on the graph. digest: bytes that tell models apart, for caches of
    answers. `source`: for an encoder-decoder, the inputs that stay the same while decoding, one row each.
    """

    def __init__(self, config: ModelConfig, session: "InferenceSession", digest: bytes = b"") -> None:
        super().__init__()
        self.config, self.session = config, session
        self.embed = nn.Embedding(config.vocab_size, 0)  # no weights: its device is that of the tokens
        self.register_buffer("digest", torch.tensor(list(digest), dtype=torch.uint8))
        self.names = past_names(config.n_decoder_layer or config.n_layer)
        types = {node.name: node.type for node in session.get_inputs()}
        self.dtype = torch.float16 if types[self.names[0]] == "tensor(float16)" else torch.float32
        self.source: dict[str, Tensor] = {}  # further inputs of the graph, one row each

    def forward(self, input_ids: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """Logits (B, T, V)."""
        return self.features(input_ids, segment_ids)

    def features(
        self, input_ids: Tensor, segment_ids: Tensor | None = None, *, cache: OnnxCache | None = None
    ) -> Tensor:
        """Logits (B, T, V) in float32 of T tokens that follow those in the cache, which advances."""
        B, T = input_ids.shape
        cache = self.new_cache(B, T) if cache is None else cache
        mask = cache.seen(segment_ids, T)
        inputs = {"input_ids": input_ids.cpu(), "attention_mask": mask, **self.source}
        inputs |= dict(zip(self.names, cache.past, strict=True))
        logits, *cache.past = run(self.session, inputs)
        cache.mask, cache.length = mask, cache.length + T
        return logits.float().to(input_ids.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """The argument: `features` gives logits already."""
        return hidden

    def new_cache(self, batch_size: int, max_length: int) -> OnnxCache:
        """An empty cache for max_length tokens a row."""
        size = (batch_size, self.config.n_kv_head, 0, self.config.head_dim)
        return OnnxCache(batch_size, max_length, [torch.zeros(size, dtype=self.dtype) for _ in self.names])

    def keep_rows(self, rows: Tensor) -> "OnnxDecoder":
        """The same decoder with row rows[i] of the sources at i, (B',) indices."""
        reordered = copy(self)
        reordered.source = {name: tensor[rows.cpu()] for name, tensor in self.source.items()}
        return reordered


class OnnxEncoderDecoder(nn.Module):
    """Two graphs: an encoder, and a decoder that attends to its output."""

    def __init__(self, encoder: "InferenceSession", decoder: OnnxDecoder) -> None:
        super().__init__()
        self.config, self.encoder, self.decoder = decoder.config, encoder, decoder

    @property
    def embed(self) -> nn.Embedding:
        """The decoder's token embedding, without weights."""
        return self.decoder.embed

    def encode_source(self, input_ids: Tensor, segment_ids: Tensor | None = None) -> OnnxDecoder:
        """The decoder bound to a source (B, S), to be decoded from like a decoder alone; segment 0 is padding."""
        mask = torch.ones_like(input_ids) if segment_ids is None else segment_ids.long()
        _, *source_tensors = run(self.encoder, {"input_ids": input_ids.cpu(), "attention_mask": mask.cpu()})
        names = source_names(self.config.n_decoder_layer)
        decoder = copy(self.decoder)
        decoder.source = {"encoder_attention_mask": mask.cpu(), **dict(zip(names, source_tensors, strict=True))}
        return decoder


def run(session: "InferenceSession", inputs: dict[str, Tensor]) -> list[Tensor]:
    """The outputs of a graph, in memory of their own."""
    arrays = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.from_numpy(array) for array in arrays]


def is_onnx(folder: Path) -> bool:
    """True if a folder holds graphs that `load_onnx` reads, and no weights of torch."""
    names = (MODEL, DECODER)
    return any((folder / name).is_file() for name in names) and not any(folder.glob("*.safetensors*"))


def load_onnx(folder: Path) -> OnnxDecoder | OnnxEncoderDecoder:
    """The model of a folder, in evaluation mode; CheckpointError for a model that does not generate text."""
    config, _ = read_config(folder / "config.json")
    if not config.writes:
        raise CheckpointError(f"{folder}: an ONNX model that writes no text; run {MODEL} with onnxruntime")
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.glob("*.onnx*")):
        digest.update(file.read_bytes())
    if config.shape is not Shape.encoder_decoder:
        return OnnxDecoder(config, open_session(folder / MODEL), digest.digest()).eval()
    decoder = OnnxDecoder(config, open_session(folder / DECODER), digest.digest())
    return OnnxEncoderDecoder(open_session(folder / ENCODER), decoder).eval()


def open_session(file: Path) -> "InferenceSession":
    """ONNX Runtime on a graph, on the CPU with as many threads as torch; CheckpointError for a broken file."""
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError("an ONNX model needs onnxruntime: pip install -e '.[onnx]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no common base
        raise CheckpointError(f"{file}: ONNX Runtime refuses it ({str(error).splitlines()[0]})") from None
