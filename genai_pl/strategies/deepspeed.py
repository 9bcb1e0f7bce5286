"""DeepSpeed: ZeRO through Lightning's strategy."""

from importlib.util import find_spec

from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy

from genai_pl.errors import ConfigError


def deepspeed(*, stage: int, offload_optimizer: bool, offload_parameters: bool) -> Strategy:
    """Lightning's DeepSpeed strategy; ConfigError where the package is not installed.

    stage: of ZeRO, 1 to 3
    offload_optimizer, offload_parameters: keep them in RAM
    """
    if find_spec("deepspeed") is None:
        raise ConfigError("strategy=deepspeed: the package is not installed; pip install deepspeed, or strategy=fsdp")
    return DeepSpeedStrategy(stage=stage, offload_optimizer=offload_optimizer, offload_parameters=offload_parameters)
