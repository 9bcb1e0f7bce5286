"""python serve.py checkpoint=MODEL: a trained model over HTTP with OpenAI's API; `--help` lists the options."""

from genai_pl.imports import collecting_later, ending_in_one_line

with ending_in_one_line():
    from omegaconf import DictConfig

    from genai_pl.cli.command import command


@command("serve", own_signals=True)
def main(config: DictConfig) -> int:
    with collecting_later():
        from genai_pl.cli.serve import serve

    return serve(config)


if __name__ == "__main__":
    main()
