"""python export.py: a trained model as a folder for transformers, PEFT or vLLM, or as ONNX; `--help` lists the options."""

from genai_pl.imports import collecting_later, ending_in_one_line

with ending_in_one_line():
    from omegaconf import DictConfig

    from genai_pl.cli.command import command


@command("export")
def main(config: DictConfig) -> int:
    with collecting_later():
        from genai_pl.cli.export import export

    return export(config)


if __name__ == "__main__":
    main()
