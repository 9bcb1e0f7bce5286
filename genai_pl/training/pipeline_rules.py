"""Rules of pipeline schedules: options of a run that a schedule excludes."""

from omegaconf import DictConfig

from genai_pl.errors import ConfigError


def check_schedule(config: DictConfig) -> None:
    """ConfigError for what joins the two halves of a backward pass that a schedule of pipelines splits."""
    if config.strategy.get("schedule") != "zero_bubble":
        return
    options = config.trainer
    joined = {"compile": config.compile is True, "trainer.recompute": options.recompute or options.recompute_every}
    for name, value in joined.items():
        if value:
            raise ConfigError(
                f"{name} does not go with strategy.schedule=zero_bubble, which splits backward passes: take interleaved"
            )
