"""The distill command: a teacher reads the training rows of a run once, and its likeliest tokens are written to a folder.

`objective.teacher=FOLDER` of train.py reads it, without the teacher. Reader and writer are those of `objective.top_k`
(`genai_pl/modules/teacher_cache.py`). A row is marked once it is on disk, so a killed command goes on where it was.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from omegaconf import DictConfig

from genai_pl.atomic_io import claimed
from genai_pl.devices import choose_device, dtypes_of
from genai_pl.endpoints import ADDRESSES
from genai_pl.errors import ConfigError
from genai_pl.modules.distillation import DistillModule
from genai_pl.modules.served_teacher import Server
from genai_pl.modules.teacher_cache import Contents, TeacherCache, digest_rows, fill_cache
from genai_pl.modules.teachers import ModelTeacher, RowTeacher
from genai_pl.progress import progress_bar
from genai_pl.training.alignment_rules import DISTILL_COMMAND_RULES
from genai_pl.training.data_only import DataOnly, open_data, tokenize_data
from genai_pl.training.hydra_job import job_overrides
from genai_pl.training.report import shell_arguments
from genai_pl.training.targets import instantiate
from genai_pl.training.teachers import check_tokenizer, load_teacher, open_served_teacher
from genai_pl.training.trust import key_of, value_of
from genai_pl.training.unused_options import refuse_unused

READ = ("data", "tokenizer", "seed", "model", "experiment")  # options that decide what the rows are


def distill(config: DictConfig) -> int:
    """Write what the folder lacks, and print the command that trains on it; the exit status."""
    served = config.teacher.startswith(ADDRESSES)
    check_options(config)
    out = Path(config.out)
    # the rows, as a run with these options reads them
    config = config.copy()
    config.init_from = config.init_from or (None if served else config.teacher)
    opened = open_data(config)
    if opened.data.streaming or opened.data.source_names:
        raise ConfigError("data: a stream or mixture has no fixed rows; give one source, without data.streaming")
    read = tokenize_data(config, opened)
    # the teacher, and the folder that is its
    device = choose_device(config.device)
    teacher = build_teacher(config, read)
    teacher.to(device)
    if teacher.context is not None and teacher.context < read.data.seq_len:
        raise ConfigError(f"teacher={config.teacher}: reads at most {teacher.context} tokens; lower data.seq_len")
    cache = open_cache(out, config, read, teacher)
    write(cache, read, teacher, device=device, precision=config.precision.lightning)
    print(f"next        python train.py objective=distill {next_arguments(config)}")
    return 0


def check_options(config: DictConfig) -> None:
    """ConfigError for values that cannot work, before anything is read."""
    if config.top_k < 1:
        raise ConfigError(f"top_k={config.top_k} must be at least 1")
    if not 0 < config.temperature < math.inf:
        raise ConfigError(f"temperature={config.temperature} must be above 0, and finite")
    dtypes_of(config.precision.lightning)
    if not config.objective._target_.endswith(f".{DistillModule.__name__}"):
        raise ConfigError("objective: distill.py writes what objective=distill reads; leave it out")
    for override in job_overrides():
        key = key_of(override)
        if key.startswith("objective.") and not key.startswith("objective.server."):
            raise ConfigError(f"{override}: has no effect: only the teacher is asked; give it to train.py")
    refuse_unused(config, job_overrides(), DISTILL_COMMAND_RULES)


def build_teacher(config: DictConfig, read: DataOnly) -> RowTeacher:
    """The teacher, whose tokenizer is that of the rows."""
    if config.teacher.startswith(ADDRESSES):
        server: Server = instantiate(config.objective.server, at="objective.server")
        options = {"top_k": config.top_k, "vocab_size": len(read.tokenizer), "temperature": config.temperature}
        return open_served_teacher(config.teacher, server, read.tokenizer, option="teacher", **options)
    dtype, _ = dtypes_of(config.precision.lightning)
    loaded = load_teacher(config.teacher, dtype=dtype, option="teacher")
    check_tokenizer(config.teacher, loaded, read.tokenizer, option="teacher")
    if config.top_k >= loaded.model.config.vocab_size:
        raise ConfigError(f"top_k={config.top_k} must be below the vocabulary of {loaded.model.config.vocab_size:,}")
    return ModelTeacher(loaded.model, temperature=float(config.temperature))


def open_cache(out: Path, config: DictConfig, read: DataOnly, teacher: RowTeacher) -> TeacherCache:
    """The file in the folder, which is made unless it is there; ConfigError for that of another teacher or other rows."""
    rows, seq_len = read.data.train_rows, read.data.seq_len
    wanted = Contents(
        len(rows),
        seq_len,
        config.top_k,
        digest_rows(rows, seq_len),
        teacher.fingerprint(config.precision.lightning),
        config.teacher,
        float(config.temperature),
    )
    if out.exists() and not TeacherCache.is_at(out):
        raise ConfigError(f"out={config.out}: there is something else; name a new folder")
    TeacherCache.create(out, wanted, vocab_size=len(read.tokenizer))
    cache = TeacherCache(out, writable=True)
    for name, what in (
        ("digest", "other rows"),
        ("teacher", "another teacher"),
        ("top_k", "another top_k"),
        ("temperature", "another temperature"),
    ):
        if getattr(cache.contents, name) != getattr(wanted, name):
            raise ConfigError(f"out={config.out}: holds {what} ({cache.contents.name}); name a new folder")
    return cache


def write(cache: TeacherCache, read: DataOnly, teacher: RowTeacher, *, device: torch.device, precision: str) -> None:
    """Ask for the rows that are missing, under a bar."""
    _, autocast = dtypes_of(precision)
    context: Callable[[], AbstractContextManager] = nullcontext
    if autocast is not None:
        context = lambda: torch.autocast(device.type, dtype=autocast)  # noqa: E731
    start, data, missing = time.monotonic(), read.data, int((cache.done == 0).sum())
    with claimed(cache.folder), progress_bar(missing, "teacher") as bar:
        options = {"device": device, "batch_size": data.batch_size, "context": context, "advance": bar.update}
        fill_cache(cache, data.train_rows, data.collate, teacher, **options)
    contents = cache.contents
    n_tokens = contents.rows * contents.seq_len
    print(
        f"written     {contents.rows:,} rows of {contents.seq_len} tokens in {cache.folder}, {contents.top_k} tokens of each: "
        f"at most {n_tokens * cache.bytes_per_token / 1e6:,.1f} MB, {time.monotonic() - start:.1f} s",
        flush=True,
    )


def next_arguments(config: DictConfig) -> str:
    """The options of a run that reads the file: those that decided what the rows are."""
    typed = {key_of(o): value_of(o) for o in job_overrides() if key_of(o).partition(".")[0] in READ}
    start = {} if any(key.startswith(("tokenizer", "model")) for key in typed) else {"init_from": "STUDENT"}
    warm = {} if config.temperature == 1 else {"objective.temperature": config.temperature}
    return shell_arguments({"objective.teacher": config.out, **warm, **start, **typed})
