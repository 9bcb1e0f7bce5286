"""python train.py: train a language model; every option is in conf/, `--help` lists them."""

from genai_pl.imports import collecting_later, ending_in_one_line

with ending_in_one_line():
    from omegaconf import DictConfig

    from genai_pl.cli.command import command
    from genai_pl.training.resume import replay
    from genai_pl.training.sweeps import Outcome


@command("config", prepare=replay, records=True)
def main(config: DictConfig) -> int | Outcome:
    if config.dry_run:
        with collecting_later():
            from genai_pl.cli.dry_run import dry_run

        return dry_run(config)
    with collecting_later():
        from genai_pl.training.train import train

    return train(config)


if __name__ == "__main__":
    main()
