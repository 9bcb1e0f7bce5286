"""python generate.py: continue text with a trained model; `--help` lists the options."""

from omegaconf import DictConfig

from genai_pl.cli.command import command
from genai_pl.imports import collecting_later


@command("generate")
def main(config: DictConfig) -> int:
    with collecting_later():
        from genai_pl.cli.generate import generate

    return generate(config)


if __name__ == "__main__":
    main()
