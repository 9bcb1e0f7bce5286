"""python train.py: train a language model; every option is in conf/, `--help` lists them."""

from omegaconf import DictConfig

from genai_pl.config import command
from genai_pl.resume import replay


@command("config", prepare=replay)
def main(config: DictConfig) -> int:
    from genai_pl.run import train

    return train(config)


if __name__ == "__main__":
    main()
