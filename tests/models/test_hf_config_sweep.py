"""A folder with any key of config.json or any tensor changed is read as transformers reads it, or refused in one line."""

from collections import Counter
from pathlib import Path

import pytest
import sweep

from tests.conftest import some

FEW = 23  # of the cases, in the default suite: one in this many, another one first for each model
SMALL = (
    "gpt2",
    "llama_tied",
    "gemma3",
    "bert",
    "roberta",
    "albert_headless",
    "flan_t5",
    "xlnet_untied",
    "qwen3_score",
    "gpt_oss",
)


@pytest.fixture(autouse=True)
def _quiet():
    import logging

    import transformers

    verbosity = transformers.logging.get_verbosity()
    sweep.quiet()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
    logging.disable(logging.NOTSET)


WRAPPED = (
    "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma3", "mixtral", "qwen3_moe", "olmoe", "dots1", "gpt_oss",
)  # fmt: skip


def swept(name: str, folder: Path, *, every: int = 1, wrapped: bool = False) -> Counter:
    """How many changed folders came to which verdict; a failure for those that are read wrongly.

    wrapped: by model=hf, and only with changed keys, as tensors are read by transformers there.
    """
    sweep.make(name, folder / "base")
    judge = sweep.judge_wrapped if wrapped else sweep.judge
    tensors = [] if wrapped else sweep.tensor_cases(folder / "base")
    cases = [*sweep.key_cases(name, folder / "base"), *tensors]
    counts, faults = Counter(), []
    for case in cases[list(sweep.MODELS).index(name) % every :: every]:
        verdict = judge(name, sweep.changed(folder / "base", case, folder / "case"))
        counts[verdict.kind] += 1
        if verdict.kind == "wrong":
            faults.append(f"{case.name}: {verdict.why}")
    assert not faults, "\n".join(faults)
    return counts


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", some(SMALL))
def test_a_changed_folder_is_read_as_transformers_reads_it_or_refused(name: str, tmp_path: Path):
    counts = swept(name, tmp_path, every=FEW)
    assert counts["equal"]
    assert counts["refused"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_changed_folder_is_wrapped_as_transformers_reads_it_or_refused(name: str, tmp_path: Path):
    counts = swept(name, tmp_path, every=FEW, wrapped=True)
    assert counts["equal"]
    assert counts["refused"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRAPPED)
def test_every_change_of_a_folder_is_wrapped_as_transformers_reads_it_or_refused(name: str, tmp_path: Path):
    counts = swept(name, tmp_path, wrapped=True)
    assert counts["equal"] > 200
    assert counts["refused"] > 150


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sweep.MODELS)
def test_every_change_of_a_folder_is_read_as_transformers_reads_it_or_refused(name: str, tmp_path: Path):
    counts = swept(name, tmp_path)
    assert counts["equal"] > 200
    assert counts["refused"] > 150
