"""The command line of data.py: its first two words, and the objective that fits the columns of the data."""

from pathlib import Path

from genai_pl.errors import ConfigError

TASKS = ("inspect", "prepare")
OBJECTIVES = {"preference": "dpo", "unpaired": "kto", "chat": "sft", "prompts": "grpo"}  # by kind, in this order
# by columns, in this order, after those of the table of formats
COLUMNS = {
    "contrastive": {"anchor", "positive"},
    "rerank": {"query", "documents", "labels"},
    "seq2seq": {"source", "target"},
    "token_classify": {"tokens", "tags"},
    "classify": {"text", "label"},
}
STEPWISE = {"prompt", "completions", "labels"}
CHOOSERS = ("objective", "data", "experiment")


def complete_arguments(words: list[str]) -> list[str]:
    """The words with `task=`, `data.path=` and, where nothing chooses one, an `objective=` by the columns of the data.

    ConfigError without a task, or without a path.
    """
    if not words or words[0] not in TASKS:
        given = f", not {words[0]!r}" if words else ""
        raise ConfigError(f"data.py begins with what to do, {' or '.join(TASKS)}{given}: data.py inspect FILE")
    task, *rest = words
    if rest and not rest[0].startswith("-") and ("=" not in rest[0] or Path(rest[0]).exists()):
        rest[0] = f"data.path={rest[0]}"
    path = next((word.partition("=")[2] for word in rest if word.startswith("data.path=")), None)
    mixes = any(word.startswith(("data.sources", "experiment=")) for word in rest)
    if path is None and not mixes:
        raise ConfigError(f"data.py {task}: give a file, folder, glob or hub name after {task}")
    if path is not None and not any(word.partition("=")[0] in CHOOSERS for word in rest):
        rest += objective_of(path, rest)
    return [f"task={task}", *rest]


def objective_of(path: str, words: list[str]) -> list[str]:
    """[objective=...] of the first kind whose columns the data have; [] for texts."""
    from genai_pl.data import formats, sources

    source = sources.find_source(path.strip("'\""))
    names = {*sources.column_names(source), *_renamed(words)}
    if source.is_text:
        return []
    if names >= STEPWISE:  # it has the columns of ranked completions too
        return ["objective=process_reward"]
    kind = next((kind for kind in OBJECTIVES if _fits(formats.FORMATS[kind], names)), None)
    objective = OBJECTIVES[kind] if kind else next((name for name in COLUMNS if COLUMNS[name] <= names), None)
    if objective is None and "text" in names:
        return []
    if objective is None:
        found = ", ".join(sorted(names))
        raise ConfigError(
            f"data.path={path}: found: {found}; give objective=, and data.columns={{prompt: NAME}} or data.column="
        )
    return [f"objective={objective}"]


def _renamed(words: list[str]) -> list[str]:
    """The names that `data.columns=` gives on the command line."""
    values = [word.partition("=")[2].strip("{} ") for word in words if word.startswith("data.columns=")]
    given = [pair.partition(":")[0].strip() for value in values for pair in value.split(",")]
    dotted = [word.partition("=")[0].rpartition(".")[2] for word in words if word.startswith("data.columns.")]
    return [name for name in given + dotted if name]


def _fits(forms: list, names: set[str]) -> bool:
    """Whether any of the formats has its columns among the names."""
    return any(set(form.required.values()) <= names for form in forms)
