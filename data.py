"""python data.py inspect|prepare PATH: look at training data as a run would read it, or tokenize it once; `--help` says how."""

from genai_pl.imports import collecting_later, ending_in_one_line

with ending_in_one_line():
    from omegaconf import DictConfig

    from genai_pl.cli.command import command
    from genai_pl.cli.data_arguments import TASKS, complete_arguments


@command("inspect", prepare=complete_arguments, tasks=TASKS)
def main(config: DictConfig) -> int:
    with collecting_later():
        from genai_pl.cli.data import inspect, prepare

    return inspect(config) if config.task == "inspect" else prepare(config)


if __name__ == "__main__":
    main()
