"""python generate.py: continue text with a trained model; `--help` lists the options."""

from genai_pl.imports import collecting_later, ending_in_one_line

with ending_in_one_line():
    from omegaconf import DictConfig

    from genai_pl.cli.command import command


@command("generate")
def main(config: DictConfig) -> int:
    with collecting_later():
        from genai_pl.cli.generate import generate

    return generate(config)


if __name__ == "__main__":
    main()
