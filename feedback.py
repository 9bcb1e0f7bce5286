"""python feedback.py: let a model judge or improve answers, and write what the others train on; `--help` lists the options."""

from genai_pl.imports import collecting_later, ending_in_one_line

with ending_in_one_line():
    from omegaconf import DictConfig

    from genai_pl.cli.command import command


@command("feedback")
def main(config: DictConfig) -> int:
    with collecting_later():
        from genai_pl.cli.feedback import feedback

    return feedback(config)


if __name__ == "__main__":
    main()
