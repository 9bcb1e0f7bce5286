"""python evaluate.py: how well a trained model predicts a text or completions; `--help` lists the options."""

from genai_pl.imports import collecting_later, ending_in_one_line

with ending_in_one_line():
    from omegaconf import DictConfig

    from genai_pl.cli.command import command


@command("evaluate")
def main(config: DictConfig) -> int:
    with collecting_later():
        from genai_pl.cli.evaluate import evaluate

    return evaluate(config)


if __name__ == "__main__":
    main()
