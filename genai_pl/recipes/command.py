"""The command `recipes.py`: lists the recipes, makes their data, copies their settings, shows what a run learned."""

import importlib
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import yaml

from genai_pl.atomic_io import write_atomic
from genai_pl.errors import ConfigError, DataError, UserError
from genai_pl.recipes import RECIPES

CONF = Path(__file__).resolve().parent.parent.parent / "conf" / "experiment"
HELP = """python recipes.py                           the applications, and what each took
python recipes.py NAME [out=data/NAME]      make its data from a package registry; then: python train.py experiment=NAME
python recipes.py show RUN                  write what a run learned into RUN/shown: pictures, tunes, translations, figures
python recipes.py copy NAME [out=my_conf]   copy its settings to out/experiment/my_NAME.yaml, to edit;
                                            then: python train.py --config-dir my_conf experiment=my_NAME"""


def main(arguments: list[str]) -> int:
    """Run the command line and print its result; the exit status."""
    try:
        print(run_command(arguments), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return 0


def run_command(arguments: list[str]) -> str:
    """The text to print for a command line; files are written on the way. ConfigError for an unknown command or option."""
    # options are NAME=VALUE, everything else is a word of the command
    words = [a for a in arguments if "=" not in a]
    options = dict(a.split("=", 1) for a in arguments if "=" in a)
    unknown = set(options) - {"out"}
    if unknown:
        raise ConfigError(f"{min(unknown)}: no such option; only out= is known")
    # one command per number and kind of words
    match words:
        case ["--help" | "-h"]:
            return HELP
        case []:
            return listing()
        case ["show", run]:
            return show(Path(run))
        case ["copy", name]:
            return copy(known_recipe(name), Path(options.get("out", "my_conf")))
        case [name]:
            return prepare(known_recipe(name), Path(options.get("out", f"data/{name}")))
    raise ConfigError(f"recipes.py {' '.join(words)}: not understood; python recipes.py --help")


def known_recipe(name: str) -> str:
    """The name, if there is such a recipe."""
    if name not in RECIPES:
        raise ConfigError(f"{name}: no such recipe; there are {', '.join(RECIPES)}")
    return name


def listing() -> str:
    """Each recipe with the description and measurements in the comments of its option file."""
    lines = []
    for name in RECIPES:
        comments = [line[2:] for line in (CONF / f"{name}.yaml").read_text().splitlines() if line.startswith("# ")]
        _, description, *measured = comments
        lines += [f"{name:<15}{description}", *(f"{'':15}{line}" for line in measured)]
    return "\n".join([*lines, "", HELP])


def recipe_module(name: str) -> ModuleType:
    """The module of a recipe."""
    return importlib.import_module(f"genai_pl.recipes.{name}")


def prepare(name: str, out: Path) -> str:
    """Make the data of a recipe; a line about the files, and the next command."""
    module = recipe_module(name)
    options = "" if out == Path("data") / name else f" data.path={out}/train.jsonl data.val_path={out}/val.jsonl"
    result = "its text is shipped: nothing to make"
    if hasattr(module, "prepare"):
        with tempfile.TemporaryDirectory() as work:
            result = module.prepare(module.find(Path(work)), out)
    return f"{result}\nnext        python train.py experiment={name}{options if result.endswith('jsonl') else ''}"


def copy(name: str, out: Path) -> str:
    """Copy a recipe's settings to OUT/experiment/my_NAME.yaml.

    The prefix matters: where Hydra finds a name in two places, it takes the shipped one.
    """
    path = out / "experiment" / f"my_{name}.yaml"
    if path.exists():
        raise ConfigError(f"{path} is there already; remove it, or give out=")
    write_atomic(path, lambda part: part.write_text((CONF / f"{name}.yaml").read_text()))
    return f"{path}: edit it, then\nnext        python train.py --config-dir {out} experiment=my_{name}"


def show(run: Path) -> str:
    """Let the model of a run write what its recipe shows, into RUN/shown; the recipe is known by the run's data.path."""
    saved = run / ".hydra" / "config.yaml"
    try:
        config = yaml.safe_load(saved.read_text(encoding="utf-8"))
    except OSError:
        raise DataError(f"{run}: no run folder (it has no .hydra/config.yaml)") from None
    data = Path(config["data"]["path"])
    # data/NAME/train.jsonl, or the name of a shipped set
    name = data.name if data.name in RECIPES else data.parent.name
    if name not in RECIPES:
        raise ConfigError(f"{run}: trained on {data}, which is no recipe's data; there are {', '.join(RECIPES)}")
    folder = launch_folder(run) / data.parent
    if name == "shakespeare" or (folder / "val.jsonl").exists():
        return "\n".join(recipe_module(name).show(text_generator(run, config["generation"]), folder, run / "shown"))
    raise DataError(f"{folder}: the data of this run are not there; python recipes.py {name} makes them")


def launch_folder(run: Path) -> Path:
    """The folder in which the run was started, to which its paths are relative."""
    settings = yaml.safe_load((run / ".hydra" / "hydra.yaml").read_text(encoding="utf-8"))
    return Path(settings["hydra"]["runtime"]["cwd"])


def text_generator(run: Path, options: dict[str, object]):
    """A function that continues prompts with the run's model and settings, in batches of 50."""
    import torch

    from genai_pl.config.generation import GenerationConfig
    from genai_pl.generation import generate_text
    from genai_pl.loading import load

    model, tokenizer, _ = load(str(run))
    generator = torch.Generator().manual_seed(0)

    def generate(prompts: list[str], max_new_tokens: int) -> list[str]:
        config = GenerationConfig(**{**options, "max_new_tokens": max_new_tokens})
        texts = []
        for n in range(0, len(prompts), 50):
            results = generate_text(model, tokenizer, prompts[n : n + 50], config, generator=generator)
            texts += [samples[0] for samples in results]
        return texts

    return generate
