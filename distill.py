"""python distill.py: write a teacher's likeliest tokens of training rows to disk, for objective=distill; `--help` says how."""

from genai_pl.imports import collecting_later, ending_in_one_line

with ending_in_one_line():
    from omegaconf import DictConfig

    from genai_pl.cli.command import command


@command("distill")
def main(config: DictConfig) -> int:
    with collecting_later():
        from genai_pl.cli.distill import distill

    return distill(config)


if __name__ == "__main__":
    main()
