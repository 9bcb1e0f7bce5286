"""Options that were typed and have no effect are refused, or said."""

import json
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from genai_pl.cli.command import CONF, register
from genai_pl.cli.quoting import quote_argument
from genai_pl.errors import ConfigError
from genai_pl.training.unused_options import (
    ENCODER_RULE,
    EVALUATE_RULES,
    EXPORT_RULES,
    FEEDBACK_RULES,
    GENERATE_RULES,
    TRAIN_RULES,
    WRITER_RULE,
    refuse_unused,
    unused_lines,
)
from tests.conftest import TINY

RULES = {
    "config": TRAIN_RULES,
    "generate": GENERATE_RULES,
    "evaluate": EVALUATE_RULES,
    "export": EXPORT_RULES,
    "feedback": FEEDBACK_RULES,
}
NEEDS = {"export": ["out=x"], "feedback": ["data.path=x"], "config": ["data.path=x"]}
NO_EFFECT = [  # command, what makes it so, what was typed
    ("config", "callbacks.samples.every_n_steps=null", "callbacks.samples.max_new_tokens=5"),
    ("config", "callbacks.samples.every_n_steps=null", "generation.top_k=5"),
    ("config", "callbacks.samples.every_n_steps=null", "generation=greedy"),
    ("config", "objective=grpo", "generation.temperature=0.5"),
    ("config", "objective=ppo", "callbacks.samples.prompts=[a]"),
    ("config", "seed=1", "generation.max_new_tokens=5"),
    ("config", "seed=1", "plan.network=25"),
    ("config", "seed=1", "plan=a100"),
    ("config", "seed=1", "data.block_rows=7"),
    ("config", "data.val_path=y", "data.val_fraction=0.2"),
    ("config", "data.streaming=true", "data.val_fraction=0.2"),
    ("config", "objective=dpo", "objective.target_margin=1"),
    ("config", "objective=dpo", "objective.nll_coef=2"),
    ("config", "objective=dpo objective.loss=ipo", "objective.label_smoothing=0.1"),
    ("config", "objective=dpo objective.loss=simpo", "objective.precompute_reference=true"),
    ("config", "objective=dpo", "objective.reference_cache=here"),
    ("config", "objective=grpo objective.advantage=rloo", "objective.scale=none"),
    ("config", "objective=dr_grpo", "objective.kl=reward"),
    ("config", "objective=rloo", "objective.kl_estimator=k2"),
    ("config", "objective=cispo", "objective.clip_range=0.1"),
    ("config", "objective=ppo", "objective.kl_horizon=5"),
    ("config", "objective=ppo", "objective.pass_score=1"),
    ("config", "objective=distill objective.teacher=m", "objective.server.retries=2"),
    ("config", "objective=distill objective.teacher=http://h/v1 objective.top_k=8", "objective.server.top_k=4"),
    ("config", "peft=prompt", "peft.init_text=hello"),
    ("config", "objective=contrastive resume=a objective.learn_temperature=true", "objective.temperature=1"),
    ("generate", "embed=true", "generation.top_k=5"),
    ("generate", "embed=true", "num_samples=2"),
    ("generate", "score=true", "generation=beam"),
    ("generate", "score=true", "logprobs=true"),
    ("generate", "score=true", "pooling=mean"),
    ("generate", "prompt=a", "prompt_file=b"),
    ("generate", "prompt=a", "adapter_weights=[1]"),
    ("generate", "generation=greedy", "generation.top_k=5"),
    ("generate", "generation=greedy", "generation.top_p=0.5"),
    ("generate", "generation=greedy", "seed=5"),
    ("generate", "generation=greedy", "num_samples=3"),
    ("generate", "prompt=a", "generation.length_penalty=2"),
    ("generate", "generation=beam", "generation.diversity_penalty=2"),
    ("generate", "prompt=a", "generation.draft_tokens=2"),
    ("generate", "generation=beam", "generation.cuda_graphs=false"),
    ("evaluate", "tasks=[t]", "data.path=x"),
    ("evaluate", "tasks=[t]", "batch_tokens=100"),
    ("evaluate", "limit=3", "batch_size=2"),
    ("export", "format=peft", "dtype=bf16"),
    ("export", "format=peft adapter=a", "checkpoint=b"),
    ("feedback", "task=critique", "judge=m"),
    ("feedback", "task=critique", "rubric=kind"),
    ("feedback", "task=label", "constitution=c"),
    ("feedback", "judge=m", "retries=2"),
    ("feedback", "judge=http://x checkpoint=http://y", "generation.top_k=3"),
]
EFFECT = [
    ("config", "seed=1", "generation.top_k=5"),
    ("config", "dry_run=true", "plan=a100"),
    ("config", "data.streaming=true", "data.val_documents=3"),
    ("config", "objective=dpo objective.loss=simpo", "objective.target_margin=1"),
    ("config", "objective=clm", "objective.label_smoothing=0.1"),
    ("generate", "prompt=a", "generation.temperature=0.5"),
    ("generate", "generation=greedy", "num_samples=1"),
    ("generate", "generation=greedy", "generation.cuda_graphs=false"),
    ("config", "objective=contrastive resume=a", "objective.temperature=1"),
    ("generate", "embed=true", "pooling=mean"),
    ("generate", "generation=beam", "generation.length_penalty=2"),
    ("config", "objective=distill objective.teacher=http://h/v1", "objective.server.top_k=4"),
    ("feedback", "judge=http://x", "retries=2"),
]


def composed(name: str, arguments: str) -> tuple[DictConfig, list[str]]:
    """A configuration and the words of its command line."""
    words = [*NEEDS.get(name, []), *arguments.split()]
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, overrides=[quote_argument(word) for word in words]), arguments.split()


@pytest.mark.parametrize(("name", "beside", "option"), NO_EFFECT)
def test_an_option_without_effect_is_named_with_the_reason(name: str, beside: str, option: str) -> None:
    config, typed = composed(name, f"{beside} {option}")
    (line,) = unused_lines(config, typed, RULES[name])
    assert line.startswith(f"{option}: has no effect: ")
    with pytest.raises(ConfigError, match=r"leave it out$"):
        refuse_unused(config, typed, RULES[name])
    assert unused_lines(config, [beside], RULES[name]) == []  # the same value is no matter where nobody has typed it


@pytest.mark.parametrize(("name", "beside", "option"), EFFECT)
def test_an_option_with_an_effect_passes(name: str, beside: str, option: str) -> None:
    config, typed = composed(name, f"{beside} {option}")
    assert unused_lines(config, typed, RULES[name]) == []


def test_candidates_are_of_masks_and_draws_are_of_texts() -> None:
    config, typed = composed("generate", "prompt=a top_k=3")
    assert unused_lines(config, typed, [ENCODER_RULE]) == []
    assert "generation.top_k" in unused_lines(config, typed, [WRITER_RULE])[0]
    config, typed = composed("generate", "prompt=a generation.top_k=3")
    assert unused_lines(config, typed, [WRITER_RULE]) == []
    assert "an encoder fills in masks" in unused_lines(config, typed, [ENCODER_RULE])[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a run, once it is there."""
    return {"folder": tmp_path_factory.mktemp("trained")}


@pytest.fixture
def base(trained: dict[str, Path], command, tmp_path: Path) -> None:
    if not (trained["folder"] / "base").exists():
        assert command("train", *TINY, "trainer.max_steps=1", "output_dir=base").status == 0
        shutil.copytree("base", trained["folder"] / "base")
    else:
        shutil.copytree(trained["folder"] / "base", "base")


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("model.n_layer=2", "init_from=base has n_layer=1"),
        ("model.position=learned", "init_from=base has position=rotary"),
        ("model=llama", "init_from=base is another model (n_layer=1, n_head=4, n_embd=32)"),
        ("tokenizer=bpe", "init_from=base brings a tokenizer of its own"),
        ("trainer.max_epochs=2 trainer.max_steps=9", "has no effect beside trainer.max_epochs=2"),
    ],
)
def test_what_a_loaded_model_does_not_take_is_refused(mistake: str, message: str, base: None, command) -> None:
    result = command("train", "init_from=base", *mistake.split())
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert message in result.err
    assert mistake.split()[-1] in result.err


def test_what_a_loaded_model_is_like_or_takes_may_be_typed(base: None, command) -> None:
    result = command("train", *TINY, "trainer.max_steps=1", "init_from=base", "model.dropout=0.1", "model=gpt_nano")
    assert result.status == 0, result.err
    saved = json.loads(Path("base/model/config.json").read_text())
    assert saved["num_hidden_layers"] == 1


def test_rows_that_are_cut_to_the_context_are_said_and_fill_the_batch(base: None, command) -> None:
    arguments = ("train", "init_from=base", "trainer.max_steps=1", "trainer.limit_val_batches=1", "plan=cpu")
    result = command(*arguments, "data.seq_len=4096", "callbacks.samples.every_n_steps=null")
    assert result.status == 0, result.err
    assert "data.seq_len 4,096 -> 32: the model's context; data.batch_size 1 -> 64: as many tokens\n" in result.out
    assert "(64 rows x 32 x 1 batches x 1 devices)" in result.out
    assert "unused      plan=cpu: has no effect" in result.out
    typed = command(*arguments, "data.seq_len=4096", "data.batch_size=3", "callbacks.samples.every_n_steps=null")
    assert "data.seq_len 4,096 -> 32: the model's context\n" in typed.out
    assert "(3 rows x 32 x 1 batches x 1 devices)" in typed.out
    whole_result = command(*arguments, "data.seq_len=32", "callbacks.samples.every_n_steps=null")
    assert "(64 rows x 32 x 1 batches x 1 devices)" in whole_result.out
    assert "clamped" not in whole_result.out


@pytest.mark.parametrize("option", ["+scheduler.gamma=0.5", "+optimizer.rho=0.5"])
def test_an_option_that_a_function_lacks_is_one_line(option: str, command) -> None:
    result = command("train", *TINY, option)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert option.partition(".")[2].partition("=")[0] in result.err
