"""The feedback command: a judge in place of people; prompts in, preference pairs or revised answers out, row by row.

Work with a model or an endpoint is slow and gets interrupted, so the output file is the state: each line names its
row, finished rows are skipped on the next start, and a half line that a crash left is cut off. A file that is not
of this command and this data is refused, never appended to.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, NoReturn, TextIO

from omegaconf import DictConfig, OmegaConf

from genai_pl.cli.command import CONF
from genai_pl.cli.negatives import write_negatives
from genai_pl.data import sources
from genai_pl.data.columns import Place, preview, refuse
from genai_pl.data.formats import CONTEXT, INPUT, TOOLS, parse_prompt, recognize
from genai_pl.data.messages import TextOrMessages, extract_prompt, text_or_messages
from genai_pl.data.tool_schemas import parse_tools
from genai_pl.devices import choose_device
from genai_pl.endpoints import ADDRESSES
from genai_pl.errors import ConfigError, DataError
from genai_pl.progress import progress_bar
from genai_pl.training.ai_feedback import Writer, compare, compare_scores, critique, local_writer, remote_writer
from genai_pl.training.hydra_job import job_overrides
from genai_pl.training.report import shell_arguments
from genai_pl.training.rewards import Judge
from genai_pl.training.trust import key_of
from genai_pl.training.unused_options import FEEDBACK_RULES, refuse_unused

TASK_FIELDS = {  # what a line holds
    "label": {"row", "prompt", "chosen", "rejected", "margin", "position_bias"},
    "critique": {"row", "prompt", "completion", "chosen", "rejected", "record"},
}
LINE_START = b'{"row": '  # of each line


class Request(NamedTuple):
    """A prompt, the answers to it that the data bring, and the cell of their tools."""

    prompt: TextOrMessages | None
    answers: list[TextOrMessages]
    tools: object = None


def feedback(config: DictConfig) -> int:
    """Write one JSON line per prompt that is not in the output file yet; the exit status."""
    check_options(config)
    if config.task == "negatives":
        return write_negatives(config)
    out = Path(config.out)
    source = sources.find_source(config.data.path, columns=dict(config.data.columns))
    done = read_finished(out, config, source)
    # the data: prompts, and answers unless a model writes them
    columns_there = sources.column_names(source)
    writes = writes_answers(config, columns_there)
    prompt = prompt_column(config.data.prompt, columns_there, source)
    columns = [prompt, *([] if writes else [config.data.first, config.data.second])]
    rows = sources.read_records(source, {*columns, INPUT, CONTEXT, TOOLS})
    n_rows = None if config.limit is None else max([config.limit, *(n + 1 for n in done.rows)])
    requests = [read_request(row, columns, place) for place, row in islice(rows, n_rows)]
    check_same_requests(done, requests, config)
    # models are loaded last, after every check of files
    todo = [(n, row) for n, row in enumerate(requests[: config.limit]) if n not in done.rows]
    writer = build_writer(config, "checkpoint") if writes else None
    judge = build_writer(config, "judge") if config.judge else writer
    if judge is None:
        raise ConfigError("judge is not set: name a model, or the URL of an endpoint")
    scores_answers = isinstance(judge, Judge)
    if scores_answers and "rubric" in map(key_of, job_overrides()):
        raise ConfigError(f"rubric: not read by a reward model (judge={config.judge}); leave it out")
    run(config, todo, writer, judge, done)
    report(config, out, scores=scores_answers)
    return 0


def check_options(config: DictConfig) -> None:
    """ConfigError for values that cannot work, before anything is read."""
    if config.task not in (*TASK_FIELDS, "negatives"):
        raise ConfigError(f"task={config.task} is not one of {', '.join(TASK_FIELDS)}, negatives")
    for name, least in (("limit", 1), ("workers", 1), ("retries", 0)):
        if config[name] is not None and config[name] < least:
            raise ConfigError(f"{name}={config[name]} must be at least {least}")
    refuse_unused(config, job_overrides(), FEEDBACK_RULES)


def prompt_column(named: str, columns: Sequence[str], source: sources.Source) -> str:
    """The column of prompts: as it is named, or Alpaca's instructions where no column is named and there is no `prompt`."""
    if not columns:
        raise DataError(f"data.path={source.name}: no rows")
    own = None if named == "prompt" else {"prompt": named}
    return next(iter(recognize("prompts", columns, path=source.name, own=own).values()))


def read_request(row: Mapping[str, object], columns: Sequence[str], place: Place) -> Request:
    """The prompt of a row, its answers and tools; DataError for a conversation that ends with the assistant, and for tools
    that a model would have to answer with.
    """
    prompt = parse_prompt(row, columns[0], place)
    answers = [text_or_messages(row.get(column), place.at(column)) for column in columns[1:]]
    prompt, answers = extract_prompt(prompt, answers, place)
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        refuse(place, f"column {columns[0]!r}: ends with the assistant; a judge is asked about what follows a request")
    tools = row.get(TOOLS) or None
    if tools is not None:
        parse_tools(tools, place.at(TOOLS))
    if tools is not None and not answers:
        refuse(
            place, "column 'tools': an answer with calls is not written here; give two answers, or leave the column out"
        )
    texts = [_single_text(answer) for answer in answers]
    if None in texts:  # conversations, both of them
        texts = [[{"role": "assistant", "content": a}] if isinstance(a, str) else list(a) for a in answers]
    return Request(prompt, texts, tools)


def _single_text(value: TextOrMessages) -> str | None:
    """The text of a value, or of a lone message of the assistant; None for anything else."""
    if isinstance(value, str):
        return value
    alone = len(value) == 1 and value[0]["role"] == "assistant" and set(value[0]) == {"role", "content"}
    return value[0]["content"] if alone else None


def writes_answers(config: DictConfig, columns: list[str]) -> bool:
    """True if a model writes the answers: for critiques, and for labels where the data have no two answer columns."""
    return config.task == "critique" or not {config.data.first, config.data.second} <= set(columns)


def build_writer(config: DictConfig, option: str) -> Writer | Judge:
    """The model or the endpoint that an option names; a reward model where the option is `judge`."""
    name = config[option]
    options = OmegaConf.to_container(config.generation)
    if name.startswith(ADDRESSES):
        settings = {"key_variable": config.key_variable, "retries": config.retries, "option": option}
        return remote_writer(name, model=config.judge_model, **settings)
    return local_writer(name, option=option, device=choose_device(config.device), options=options, seed=config.seed)


def run(config: DictConfig, todo: list, writer: Writer | None, judge: Writer | Judge, done: "FinishedRows") -> None:
    """Work on the rows in `todo`, and append each result; in parallel if writer and judge are endpoints.

    Results are written in order of rows, by this thread alone, and flushed after each: a kill loses only work
    in progress.
    """
    principles = (
        read_principles(config.constitution or str(CONF / "constitution.yaml")) if config.task == "critique" else []
    )

    def work(item: tuple[int, Request]) -> dict:
        """The finished line of one request."""
        n, (prompt, answers, tools) = item
        if config.task == "critique":
            return {"row": n, **critique(writer, prompt, principles)}
        first, second = answers or (writer.answer(prompt), writer.answer(prompt))
        given = {} if tools is None else {TOOLS: tools}
        compared = label(prompt, first, second, **given) if scores else label(prompt, first, second)
        return {"row": n, **compared, **given}

    # a local model is called by one thread: a device runs one batch at a time anyway
    scores = isinstance(judge, Judge)
    label = partial(compare_scores, judge) if scores else partial(compare, judge, rubric=config.rubric)
    workers = config.workers if not scores and judge.concurrent and (writer is None or writer.concurrent) else 1
    try:
        with (
            done.open(config.out) as file,
            ThreadPoolExecutor(workers) as pool,
            progress_bar(len(todo), config.task) as bar,
        ):
            for result in pool.map(work, todo):
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
                file.flush()
                bar.update()
    except OSError as error:  # of the file: what an endpoint refuses is a ConfigError by now
        raise OSError(error.errno, os.strerror(error.errno), error.filename or config.out) from None


class FinishedRows(NamedTuple):
    """State of an output file.

    rows: line contents by row number. size: bytes of its complete lines. cut: True if an incomplete line
    follows.
    closed: True if the last line has its line break.
    """

    rows: dict[int, dict[str, object]] = {}
    size: int = 0
    cut: bool = False  # whether a line that a crash cut follows
    closed: bool = True  # whether the last line ends

    def open(self, name: str) -> TextIO:
        """The file, opened to append, its incomplete line removed."""
        out = Path(name)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            file = out.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"out={name}: cannot be written ({error.strerror})") from None
        if self.cut:
            file.truncate(self.size)
        file.write("" if self.closed else "\n")
        return file


def read_finished(out: Path, config: DictConfig, source: sources.Source) -> FinishedRows:
    """State of the output file, which is not changed; ConfigError where a line is not one that this task writes."""
    if not out.exists():
        return FinishedRows()
    if not out.is_file():
        raise ConfigError(
            f"out={config.out}: a folder, or else no file: name a file to write, as {out / 'feedback.jsonl'}"
        )
    if any(out.samefile(file) for file in source.files if isinstance(file, Path)):
        raise ConfigError(f"out={config.out}: data.path={config.data.path} is read from it; name a new file")
    try:
        *lines, last = out.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"out={config.out}: cannot be read ({error.strerror})") from None
    # an incomplete last line is cut off, a complete one without its line break is kept
    size = sum(len(line) + 1 for line in lines)
    cut = bool(last) and _is_cut(last)
    closed = cut or not last
    rows: dict[int, dict[str, object]] = {}
    for number, line in enumerate(lines if closed else [*lines, last], start=1):
        row = _own_line(line, config.task)
        if row is None or row["row"] in rows:
            _refuse_line(config, number, f"is not what task={config.task} writes" if row is None else "is a row twice")
        rows[row["row"]] = row
    return FinishedRows(rows, size, cut, closed)


def _is_cut(line: bytes) -> bool:
    """True if a line is the beginning of one of this command."""
    return (line.startswith(LINE_START) or LINE_START.startswith(line)) and _parse_json(line) is None


def _parse_json(line: bytes) -> object:
    """The value of a JSON line; None if it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _own_line(line: bytes, task: str) -> dict[str, object] | None:
    """The contents of a line that this task wrote; None for any other line."""
    contents = _parse_json(line)
    is_own = (
        isinstance(contents, dict)
        and set(contents) - {TOOLS} == TASK_FIELDS[task]
        and type(contents["row"]) is int
        and contents["row"] >= 0
    )
    answer = (str, list)
    kinds = {"chosen": answer, "rejected": answer, **({"position_bias": float} if task == "label" else {})}
    return contents if is_own and all(isinstance(contents[key], kind) for key, kind in kinds.items()) else None


def _refuse_line(config: DictConfig, number: int, why: str) -> NoReturn:
    """Raise the ConfigError for line `number` of the output file."""
    raise ConfigError(f"out={config.out}: line {number} {why}; name a new file")


def check_same_requests(done: FinishedRows, requests: Sequence[Request], config: DictConfig) -> None:
    """ConfigError where a finished line is about another prompt, or compares other answers, than its row of the
    data.
    """
    for number, (n, line) in enumerate(done.rows.items(), start=1):
        prompt, answers, _ = requests[n] if n < len(requests) else Request(None, [])
        written = [line["chosen"], line["rejected"]]
        if line["prompt"] != prompt or (answers and written not in (answers, answers[::-1])):
            why = f"is about {preview(line['prompt'])}, which is not row {n + 1} of data.path={config.data.path}"
            _refuse_line(
                config, number, why if line["prompt"] != prompt else f"compares other answers than row {n + 1} has"
            )


def read_principles(path: str) -> list[dict[str, str]]:
    """Principles of a constitution file: each a mapping with an instruction to criticize and one to revise."""
    try:
        principles = OmegaConf.to_container(OmegaConf.load(path))["principles"]
    except (OSError, KeyError, TypeError) as error:
        raise ConfigError(f"constitution={path}: no list of principles in it ({error})") from None
    if not principles or any(set(p) != {"critique", "revision"} for p in principles):
        raise ConfigError(f"constitution={path}: each principle has a critique and a revision")
    return principles


def _lines(out: Path) -> Iterator[dict]:
    """Contents of the output file, line by line."""
    with out.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def report(config: DictConfig, out: Path, *, scores: bool) -> None:
    """Print the number of rows, the judge's preference for the first place, and the command that trains on the
    file.
    """
    rows = list(_lines(out))
    if not rows:
        raise DataError(f"data.path={config.data.path}: no prompt in it")
    print(f"{config.task:<12}{len(rows):,} rows in {out}")
    if config.task == "label" and not scores:
        bias = sum(row["position_bias"] for row in rows) / len(rows)
        print(f"bias        the first place is worth {bias:+.3f} of probability; both orders were asked and averaged")
    options = {"init_from": "MODEL" if config.checkpoint.startswith(ADDRESSES) else config.checkpoint, "data.path": out}
    print(
        f"next        python train.py objective={'dpo' if config.task == 'label' else 'sft'} {shell_arguments(options)}"
    )
