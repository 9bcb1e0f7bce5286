"""python export.py: a trained model as a folder for transformers, PEFT or vLLM, or as ONNX; `--help` lists the options."""

from omegaconf import DictConfig

from genai_pl.cli.command import command
from genai_pl.imports import collecting_later


@command("export")
def main(config: DictConfig) -> int:
    with collecting_later():
        from genai_pl.cli.export import export

    return export(config)


if __name__ == "__main__":
    main()
