"""The feedback command: a judge in place of people; prompts in, preference pairs or revised answers out, row by row."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from genai_pl.config import CONF
from genai_pl.data import sources
from genai_pl.data.columns import Place, text_of
from genai_pl.data.talks import INPUT, prompt_of
from genai_pl.devices import choose_device
from genai_pl.errors import ConfigError, DataError
from genai_pl.feedback import Writer, compare, critique, local_writer, remote_writer

TASKS = ("label", "critique")


def feedback(config: DictConfig) -> int:
    """Write one line of JSON per prompt; prompts that are in the file already are passed over."""
    if config.task not in TASKS:
        raise ConfigError(f"task={config.task} is not one of {', '.join(TASKS)}")
    source = sources.find(config.data.path)
    found = sources.column_names(source)
    sources.check_columns(source, found, {"data.prompt": config.data.prompt})
    writes = needs_writer(config, found)
    columns = [config.data.prompt, *([] if writes else [config.data.first, config.data.second])]
    rows = islice(sources.rows(source, {*columns, INPUT}), config.limit)
    texts = [texts_of(row, columns, place) for place, row in rows]
    out = Path(config.out)
    done = finished(out)
    left = [(n, row) for n, row in enumerate(texts) if n not in done]
    writer = build_writer(config, config.checkpoint) if writes else None
    judge = build_writer(config, config.judge) if config.judge else writer
    if judge is None:
        raise ConfigError("judge is not set: name a model, or the URL of an endpoint")
    run(config, left, writer, judge, out)
    report(config, out)
    return 0


def texts_of(row: Mapping[str, object], columns: Sequence[str], place: Place) -> list[str]:
    """The prompt of a row, and the answers to it that the data bring; DataError where one is no text."""
    prompt = prompt_of(row, columns[0], place)
    if not isinstance(prompt, str):
        raise DataError(f"{place}: column {columns[0]!r}: a conversation; a judge is asked about texts")
    return [prompt, *(text_of(row.get(column), place._replace(column=column)) for column in columns[1:])]


def needs_writer(config: DictConfig, columns: list[str]) -> bool:
    """Whether answers are to be written: for a critique, and for labels where the data bring no two answers."""
    return config.task == "critique" or not {config.data.first, config.data.second} <= set(columns)


def build_writer(config: DictConfig, name: str) -> Writer:
    """A model of ours, or an endpoint that speaks OpenAI's protocol."""
    options = OmegaConf.to_container(config.generation)
    if name.startswith(("http://", "https://")):
        return remote_writer(name, model=config.judge_model, key_variable=config.key_variable, retries=config.retries)
    return local_writer(name, device=choose_device(config.device), options=options, seed=config.seed)


def run(config: DictConfig, left: list, writer: Writer | None, judge: Writer, out: Path) -> None:
    """Work on the rows that are left, several at once where the judge is remote, and append each result."""
    principles = (
        read_principles(config.constitution or str(CONF / "constitution.yaml")) if config.task == "critique" else []
    )

    def work(item: tuple[int, list[str]]) -> dict:
        n, (prompt, *answers) = item
        if config.task == "critique":
            return {"row": n, **critique(writer, prompt, principles)}
        first, second = answers or (writer.answer(prompt), writer.answer(prompt))
        return {"row": n, **compare(judge, prompt, first, second, rubric=config.rubric)}

    out.parent.mkdir(parents=True, exist_ok=True)
    workers = config.workers if judge.concurrent and (writer is None or writer.concurrent) else 1
    with out.open("a", encoding="utf-8") as file, ThreadPoolExecutor(workers) as pool:
        for result in tqdm(pool.map(work, left), total=len(left), disable=None, desc=config.task):
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
            file.flush()


def finished(out: Path) -> set[int]:
    """The rows that a file holds already; a line that was cut by a crash is dropped."""
    if not out.exists():
        return set()
    whole = [line for line in out.read_text(encoding="utf-8").split("\n") if _is_whole(line)]
    out.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
    return {json.loads(line)["row"] for line in whole}


def _is_whole(line: str) -> bool:
    try:
        return "row" in json.loads(line)
    except ValueError:
        return False


def read_principles(path: str) -> list[dict[str, str]]:
    """The principles of a constitution: each asks for a critique and for a revision."""
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))["principles"]
    except (OSError, KeyError, TypeError) as error:
        raise ConfigError(f"constitution={path}: no list of principles in it ({error})") from None
    if not found or any(set(p) != {"critique", "revision"} for p in found):
        raise ConfigError(f"constitution={path}: each principle has a critique and a revision")
    return found


def _lines(out: Path) -> Iterator[dict]:
    with out.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def report(config: DictConfig, out: Path) -> None:
    """Say how many there are, and how far the order of two answers swayed the judge."""
    rows = list(_lines(out))
    if not rows:
        raise DataError(f"data.path={config.data.path}: no prompt in it")
    print(f"{config.task:<12}{len(rows):,} rows in {out}")
    if config.task == "label":
        bias = sum(row["position_bias"] for row in rows) / len(rows)
        print(f"bias        the first place is worth {bias:+.3f} of probability; both orders were asked and averaged")
        print(f"next        python train.py objective=dpo init_from=MODEL data.path={out}")
    else:
        print(f"next        python train.py objective=sft init_from=MODEL data.path={out}")
