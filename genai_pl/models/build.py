"""Model construction: the class for each shape of a configuration."""

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

    Under `torch.device("meta")` nothing is drawn or stored. ConfigError if the weights do not fit into memory.
    """
    try:
        return SHAPES[config.shape](config)
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise ConfigError(
            f"model: its weights do not fit into memory ({str(error).partition(':')[2].strip()})"
        ) from None
