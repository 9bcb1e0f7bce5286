"""Model construction: the class for each shape of a configuration."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from genai_pl.config.enums import Shape
from genai_pl.config.model import ModelConfig
from genai_pl.errors import ConfigError
from genai_pl.models.decoder import Decoder
from genai_pl.models.encoder import Encoder
from genai_pl.models.encoder_decoder import EncoderDecoder

Model = Decoder | Encoder | EncoderDecoder
SHAPES = {Shape.decoder: Decoder, Shape.encoder: Encoder, Shape.encoder_decoder: EncoderDecoder}


def build_model(config: ModelConfig) -> Model:
    """A model of `config.shape` with new weights from torch's global generator, in training mode.

    ConfigError if the weights do not fit into memory.
    """
    try:
        return SHAPES[config.shape](config)
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise ConfigError(
            f"model: its weights do not fit into memory ({str(error).partition(':')[2].strip()})"
        ) from None


def build_empty(config: ModelConfig) -> Model:
    """A model on the meta device, whose weights are neither drawn nor stored; RuntimeError for a tensor without bound."""
    with torch.device("meta"), _Undrawn():
        return build_model(config)


class _Undrawn(TorchFunctionMode):
    """Context in which initialization leaves tensors as they are: on the meta device torch imports its compiler to draw."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
