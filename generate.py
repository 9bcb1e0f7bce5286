"""python generate.py: continue text with a trained model; `--help` lists the options."""

from omegaconf import DictConfig

from genai_pl.cli.command import command


@command("generate")
def main(config: DictConfig) -> int:
    from genai_pl.cli.generate import generate

    return generate(config)


if __name__ == "__main__":
    main()
