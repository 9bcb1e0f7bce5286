"""Several end tokens: every way of generating and every export respects those that a folder names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from genai_pl.config.generation import GenerationConfig
from genai_pl.config.model import ModelConfig
from genai_pl.data import byte_tokenizer
from genai_pl.data.generation_defaults import set_end_tokens
from genai_pl.data.tokenizer import save_tokenizer
from genai_pl.errors import CheckpointError
from genai_pl.generation import complete
from genai_pl.generation.grammar import build_constraint
from genai_pl.loading import Loaded, load
from genai_pl.modules.rollout import generate_rollout
from tests.conftest import TINY

TOKENIZER = byte_tokenizer()
EOS, SIZE = TOKENIZER.eos_token_id, len(TOKENIZER)
PROMPTS = ["The cat", "A dog sat", "x", "To be, or"]
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "do_sample": True, "repetition_penalty": 1.05}
SIZES = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "vocab_size": SIZE,
    "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.4, "eos_token_id": EOS,
    "bos_token_id": EOS, "pad_token_id": SIZE - 1,
}  # fmt: skip
KINDS = {
    "llama": transformers.LlamaConfig,
    "olmo2": transformers.Olmo2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
}


def edit(file: Path, **values: object) -> None:
    """Change some keys of a JSON file; ... removes one."""
    old = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({k: v for k, v in {**old, **values}.items() if v is not ...}))


def their_tokens(folder: Path, prompt: str, **options: object) -> list[int]:
    """The greedy continuation by transformers, with the folder's own end tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    input_ids = torch.tensor([TOKENIZER.encode(prompt)])
    neutral = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": None}
    arguments = {"max_new_tokens": 24, **neutral, "attention_mask": torch.ones_like(input_ids), **options}
    return model.generate(input_ids, **arguments)[0, input_ids.shape[1] :].tolist()


def our_tokens(loaded: Loaded, prompts: list[str], **options: object) -> list[list[int]]:
    config = GenerationConfig(**{"max_new_tokens": 24, "temperature": 0.0, **options})
    rows = [TOKENIZER.encode(prompt) for prompt in prompts]
    return [results[0].tokens for results in complete(loaded.model, loaded.tokenizer, rows, config)]


def write_folder(folder: Path, kind: str = "llama") -> int:
    """Write a random model whose generation_config.json has a second end token, which it soon generates; returns that token."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(KINDS[kind](**SIZES)).save_pretrained(folder)
    save_tokenizer(TOKENIZER, folder)
    second = their_tokens(folder, PROMPTS[0], eos_token_id=None)[5]
    edit(folder / "generation_config.json", eos_token_id=[EOS, second], **SAMPLING)
    return second


@pytest.fixture(scope="module", params=KINDS)
def two_ends(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, write_folder(folder, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("ends")
    return folder, write_folder(folder)


def test_any_of_two_ends_ends_a_text_as_in_transformers(two_ends: tuple[Path, int]) -> None:
    folder, second = two_ends
    theirs = [their_tokens(folder, prompt) for prompt in PROMPTS]
    assert len(theirs[0]) < 24
    assert theirs[0][-1] == second
    loaded = load(str(folder))
    assert loaded.model.config.eos_token_ids == (EOS, second)
    assert our_tokens(loaded, PROMPTS) == theirs  # in one batch
    assert our_tokens(loaded, PROMPTS, prompt_lookup=2) == theirs


def test_beams_end_at_any_of_two_ends_as_in_transformers(llama: tuple[Path, int]) -> None:
    folder, _ = llama
    options = {"num_beams": 3, "length_penalty": 1.0, "early_stopping": False}
    theirs = [their_tokens(folder, prompt, **options) for prompt in PROMPTS]
    assert any(len(row) < 24 for row in theirs)
    assert our_tokens(load(str(folder)), PROMPTS, num_beams=3) == theirs


def test_no_end_before_min_new_tokens_means_none_of_them(llama: tuple[Path, int]) -> None:
    folder, second = llama
    theirs = their_tokens(folder, PROMPTS[0], min_new_tokens=12)
    assert second not in theirs[:12]
    assert our_tokens(load(str(folder)), PROMPTS[:1], min_new_tokens=12) == [theirs]


PLACES = {
    "generation_config.json": {"generation_config.json": {"eos_token_id": [EOS, 65]}},
    "config.json": {"config.json": {"eos_token_id": [65, EOS]}, "generation_config.json": {"eos_token_id": ...}},
    "one each": {"config.json": {"eos_token_id": 65}, "generation_config.json": {"eos_token_id": EOS}},
    "the tokenizer": {"config.json": {"eos_token_id": 65}, "generation_config.json": {"eos_token_id": None}},
    "beyond the vocabulary": {"generation_config.json": {"eos_token_id": [65, 50256, -1]}},
}


@pytest.mark.parametrize("files", PLACES.values(), ids=PLACES)
def test_ends_are_found_wherever_they_stand(files: dict, llama: tuple[Path, int], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama[0], tmp_path / "model"))
    for name, values in files.items():
        edit(folder / name, **values)
    assert set(load(str(folder)).model.config.eos_token_ids) == {EOS, 65}


def test_the_marker_that_closes_a_turn_is_an_end(llama: tuple[Path, int], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama[0], tmp_path / "model"))
    closing = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|pad|>{% endfor %}"
    (folder / "chat_template.jinja").write_text(closing)
    assert set(load(str(folder)).model.config.eos_token_ids) == {EOS, llama[1], TOKENIZER.pad_token_id}


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% for %}", "{{ messages[0].x.y }}"])
def test_a_template_that_fits_no_conversation_hinders_nobody(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    config = ModelConfig(vocab_size=SIZE)
    set_end_tokens(config, tokenizer)
    assert config.eos_token_ids == (EOS,)
    tokenizer.chat_template = {"rag": "{{ messages[0].content }}", "tool_use": "{{ messages[0].content }}"}
    set_end_tokens(config, tokenizer)  # there is no default among them
    assert config.eos_token_ids == (EOS,)


@pytest.mark.parametrize("wrong", ["</s>", [1, "</s>"], {"id": 1}, True, 1.5])
def test_an_end_that_is_no_token_is_refused_in_one_line(wrong: object, llama: tuple[Path, int], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama[0], tmp_path / "model"))
    edit(folder / "generation_config.json", eos_token_id=wrong)
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id=.* is neither a token's number"):
        load(str(folder))


def ends_of(folder: Path) -> object:
    return transformers.GenerationConfig.from_pretrained(folder).eos_token_id


def kept(folder: Path) -> dict[str, object]:
    values = json.loads((folder / "generation_config.json").read_text())
    return {name: values[name] for name in SAMPLING}


@pytest.mark.parametrize("format", ["hf", pytest.param("onnx", marks=pytest.mark.slow)])
def test_an_export_lists_all_ends_and_keeps_what_the_folder_said(
    format: str, llama: tuple[Path, int], command, tmp_path: Path
) -> None:
    if format == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)
    folder, second = llama
    result = command("export", f"checkpoint={folder}", f"format={format}", "out=out")
    assert result.status == 0, result.err
    assert ends_of(tmp_path / "out") == [EOS, second]
    assert kept(tmp_path / "out") == SAMPLING
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == EOS
    loaded = load("out", onnx=True)
    assert our_tokens(loaded, PROMPTS) == our_tokens(load(str(folder)), PROMPTS)


def test_the_end_in_config_json_stays_what_it_was(llama: tuple[Path, int], command, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama[0], tmp_path / "model"))
    edit(folder / "config.json", eos_token_id=65)
    edit(folder / "generation_config.json", eos_token_id=66)
    assert command("export", "checkpoint=model", "format=hf", "out=out").status == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 65
    assert ends_of(tmp_path / "out") == [66, 65, EOS]


def test_one_end_is_written_as_a_number(llama: tuple[Path, int], command, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama[0], tmp_path / "model"))
    edit(folder / "generation_config.json", eos_token_id=EOS)
    assert command("export", "checkpoint=model", "format=hf", "out=out").status == 0
    assert ends_of(tmp_path / "out") == EOS


TRAIN = [*(option for option in TINY if not option.startswith(("model.", "tokenizer"))), "trainer.max_steps=1"]


@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_a_run_keeps_the_ends_in_its_model_and_in_its_checkpoint(kind: str, command, tmp_path: Path) -> None:
    second = write_folder(tmp_path / "base", kind)
    begin = ["init_from=base"] if kind == "llama" else ["model=hf", "model.name=base"]
    result = command("train", *TRAIN, *begin, "data.seq_len=32", "hydra.run.dir=run")
    assert result.status == 0, result.err
    for checkpoint in ("run/model", "run/checkpoints/last.ckpt"):
        loaded = load(checkpoint)
        assert loaded.model.config.eos_token_ids == (EOS, second)
        assert dict(loaded.defaults.generation).items() >= SAMPLING.items()
    assert ends_of(tmp_path / "run" / "model") == [EOS, second]
    result = command("export", "checkpoint=run/checkpoints/last.ckpt", "format=hf", "out=again")
    assert result.status == 0, result.err
    assert ends_of(tmp_path / "again") == [EOS, second]
    assert kept(tmp_path / "again") == SAMPLING


def test_an_adapter_keeps_the_ends_of_its_base_merged_or_not(command, tmp_path: Path) -> None:
    second = write_folder(tmp_path / "base")
    result = command("train", *TRAIN, "init_from=base", "peft=lora", "data.seq_len=32", "hydra.run.dir=run")
    assert result.status == 0, result.err
    assert command("export", "checkpoint=run", "format=merged", "out=merged").status == 0
    assert command("export", "checkpoint=run", "format=peft", "out=alone").status == 0
    for checkpoint in ("run", "run/checkpoints/last.ckpt", "merged", "alone"):
        assert load(checkpoint).model.config.eos_token_ids == (EOS, second)
    assert ends_of(tmp_path / "merged") == ends_of(tmp_path / "alone") == [EOS, second]
    assert kept(tmp_path / "merged") == SAMPLING


def test_an_adapter_on_top_brings_its_own_ends(llama: tuple[Path, int], command, tmp_path: Path) -> None:
    shutil.copytree(llama[0], tmp_path / "base")
    assert command("train", *TRAIN, "init_from=base", "peft=lora", "data.seq_len=32", "hydra.run.dir=run").status == 0
    edit(tmp_path / "run" / "adapter" / "generation_config.json", eos_token_id=[65])
    assert set(load("base", adapters=["run"]).model.config.eos_token_ids) == {EOS, llama[1], 65}


def test_a_rollout_ends_at_any_of_the_ends_and_says_so(llama: tuple[Path, int]) -> None:
    folder, second = llama
    model = load(str(folder)).model
    rows = [torch.tensor(TOKENIZER.encode(prompt)).numpy() for prompt in PROMPTS]
    config = GenerationConfig(max_new_tokens=24, temperature=0.0)
    options = {"generator": torch.Generator(), "pad": SIZE - 1, "ends": model.config.eos_token_ids}
    rollout = generate_rollout(model, rows, config, **options)
    theirs = [their_tokens(folder, prompt) for prompt in PROMPTS]
    assert rollout.completions == theirs
    assert rollout.ended.tolist() == [row[-1] in (EOS, second) for row in theirs]
    assert rollout.ended[0]
    assert rollout.mask.sum(1).tolist() == [len(row) for row in theirs]


def test_a_policy_ends_at_the_ends_of_the_folder_that_it_begins_from(command, tmp_path: Path) -> None:
    write_folder(tmp_path / "base")
    edit(tmp_path / "base" / "generation_config.json", eos_token_id=list(range(SIZE)))  # whatever it writes
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The cat"}\n' * 8)
    (tmp_path / "rewards.py").write_text("def one(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n")
    arguments = ["data.path=prompts.jsonl", "objective.reward=rewards:one", "objective.max_new_tokens=6"]
    result = command("train", "objective=grpo", *TRAIN, "init_from=base", *arguments, "hydra.run.dir=run")
    assert result.status == 0, result.err
    *_, header, row = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()][:2]
    results = dict(zip(header, row, strict=True))
    assert float(results["objective/ended"]) == 1.0
    assert float(results["objective/response_length"]) == 1.0


def test_a_text_of_a_grammar_is_followed_by_any_end_and_by_none_before() -> None:
    pytest.importorskip("llguidance")
    constraint = build_constraint(TOKENIZER, json_schema=None, regex="ab?", ends=(EOS, ord("b"), 7))
    constraint.begin(SIZE)

    def allowed(text: str) -> Tensor:
        return constraint.allowed(list(text.encode())).nonzero()[:, 0]

    assert allowed("").tolist() == [ord("a")]
    assert allowed("a").tolist() == sorted([EOS, ord("b"), 7])  # an end is an end, even one that might be text


def test_a_request_ends_at_any_of_the_ends(llama: tuple[Path, int]) -> None:
    pytest.importorskip("fastapi")
    from genai_pl.serving.engine.engine import Engine
    from genai_pl.serving.engine.request import Request

    folder, second = llama
    loaded = load(str(folder))
    engine = Engine(loaded.model, loaded.tokenizer, slots=2)
    engine.start()
    try:
        config = GenerationConfig(max_new_tokens=24, temperature=0.0)
        streams = [engine.submit(Request(tuple(TOKENIZER.encode(prompt)), config)) for prompt in PROMPTS]
        results = [[output.token for output in stream] for stream in streams]
    finally:
        engine.stop()
    assert results == [their_tokens(folder, prompt) for prompt in PROMPTS]
    assert results[0][-1] == second
    assert streams[0].finish_reason == "stop"
