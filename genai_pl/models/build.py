"""A model of the shape that its configuration names."""

from genai_pl.config.enums import Shape
from genai_pl.config.model import ModelConfig
from genai_pl.errors import ConfigError
from genai_pl.models.decoder import Decoder
from genai_pl.models.encoder import Encoder
from genai_pl.models.encoder_decoder import EncoderDecoder

Model = Decoder | Encoder | EncoderDecoder
SHAPES = {Shape.decoder: Decoder, Shape.encoder: Encoder, Shape.encoder_decoder: EncoderDecoder}


def build_model(config: ModelConfig) -> Model:
    """A model with new weights from torch's global generator; nothing is stored under `torch.device("meta")`.

    ConfigError where there is not as much memory.
    """
    try:
        return SHAPES[config.shape](config)
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise ConfigError(
            f"model: its weights do not fit into memory ({str(error).partition(':')[2].strip()})"
        ) from None
