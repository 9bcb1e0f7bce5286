"""The command that a run prints as its next one: it can be pasted into a shell, and shows what the model has learned."""

import json
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from genai_pl.cli.quoting import quote_argument
from genai_pl.modules.mlm import masked_words
from genai_pl.training.report import final_lines, shell_arguments
from tests.conftest import TINY, some

RUN = (*TINY, "trainer.max_steps=1", "trainer.limit_val_batches=1")
CHAT = [{"prompt": f'say {n}, it\'s "now"', "completion": f"{n}"} for n in range(20)]
PAIRS = [{"prompt": f"[{n}] a=b", "chosen": "yes", "rejected": "no"} for n in range(20)]
LIKED = [{"prompt": f"{n}", "completion": "yes", "label": n % 2 == 0} for n in range(20)]
TEXTS = [{"anchor": f"one {n}", "positive": f"two {n}"} for n in range(20)]
RUNS = {  # by objective: rows of its data, its options, and what the next command prints
    "sft": (CHAT, ["peft=lora"], "text"),
    "reward": (PAIRS, [], "score"),
    "dpo": (PAIRS, [], "text"),
    "kto": (LIKED, [], "text"),
    "contrastive": (TEXTS, [], "embedding"),
    "mlm": (None, ["model=encoder_nano"], "candidates"),
    "permutation": (None, ["model=xlnet_nano"], "embedding"),
    "span_corruption": (None, ["model=t5_nano", "model.n_decoder_layer=1", "model.intermediate_size=32"], "text"),
}
ODD = ["a b", "it's", 'say "so"', "a=b", "x[1]", "{y}", "1,2", "a;b", "$HOME", "(c)", "#1", "\\", "true", "café"]


def next_of(out: str) -> list[str]:
    """The words of the next command, as a shell takes them apart."""
    _, _, command = out.rpartition("\nnext        python ")
    return shlex.split(command)


@pytest.mark.parametrize("objective", some(RUNS))
def test_the_next_command_shows_what_the_objective_has_taught(objective: str, command, tmp_path: Path) -> None:
    rows, options, expected = RUNS[objective]
    data = [] if rows is None else ["data.path=rows.jsonl"]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or ()))
    folder = "output_dir=runs of/it's [1], a=b"
    result = command("train", *RUN, f"objective={objective}", *options, *data, folder)
    assert result.status == 0, result.err
    script, *arguments = next_of(result.out)
    assert script == "generate.py"
    assert "checkpoint=runs of/it's [1], a=b" in arguments
    plain = [] if expected != "text" else ["generation.max_new_tokens=2"]
    completion = command("generate", *arguments, *plain)
    assert completion.status == 0, completion.err
    prompt = next(a for a in arguments if a.startswith("prompt=")).partition("=")[2]
    if expected in ("score", "embedding"):
        line = json.loads(completion.out)
        assert expected in line
        assert line["prompt"] == prompt
    else:
        assert completion.out.startswith(prompt)
    if expected == "candidates":
        assert "<|mask|>" in prompt
        assert len(completion.out.splitlines()) == 1 + 5


@pytest.mark.parametrize("name", ODD)
def test_a_folder_of_any_name_is_pasted_and_read_as_it_is(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (Path(name) / "run").mkdir(parents=True)
    for finished, option in ((True, "checkpoint"), (False, "resume")):
        lines = final_lines(
            Path(name) / "run", exported=None, finished=finished, generate={"prompt": name}, arguments=[name]
        )
        _, *words = next_of("\n" + lines[-1])
        (option_word,) = [word for word in words if word.startswith(f"{option}=")]
        override = OverridesParser.create().parse_override(quote_argument(option_word))
        assert not override.is_sweep_override()
        assert override.value() == f"{name}/run"
    prompt = shlex.split(shell_arguments({"prompt": name}))
    assert [OverridesParser.create().parse_override(quote_argument(word)).value() for word in prompt] == [name]


def test_an_interrupted_run_in_an_odd_folder_goes_on_by_its_next_command(command, tmp_path: Path) -> None:
    folder = "it's [1], a=b"
    assert command("train", *RUN, f"output_dir={folder}").status == 0
    lines = final_lines(Path(folder), exported=None, finished=False, generate={})
    _, *words = next_of("\n" + lines[-1])
    result = command("train", *words, "trainer.max_steps=2")
    assert result.status == 0, result.err
    assert (Path(folder) / "checkpoints" / "step=000002.ckpt").exists()


def test_the_second_word_is_masked() -> None:
    assert masked_words("The cat sat on the mat.", "<mask>") == "The <mask> sat on the mat."
