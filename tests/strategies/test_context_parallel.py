"""Processes that divide the tokens of each row compute the losses, gradients and weights of one."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from genai_pl.distributed.context_group import ContextGroup
from genai_pl.errors import ConfigError
from genai_pl.models import ModelConfig, build_model
from genai_pl.modules.base import BaseModule
from genai_pl.modules.clm import CausalLMModule
from genai_pl.modules.ppo import PPOModule
from genai_pl.modules.preference import PreferenceModule, completion_logprobs
from genai_pl.modules.reward import RewardModule
from genai_pl.objectives import IGNORED, masked_accuracy, token_loss
from genai_pl.peft import lora, prompt
from genai_pl.strategies import ShardedStrategy, recompute
from genai_pl.strategies.context_parallel import check_sequences, split_sequences
from tests.small_models import GPT, LLAMA
from tests.strategies.processes import HALF, SAME, SMALL, WHOLE, assert_same, table, train

GPT, LLAMA = {**GPT, "n_layer": 2}, {**LLAMA, "n_layer": 2}
GEMMA = {**LLAMA, "window": 5, "full_every": 2, "softcap": 5.0, "qk_norm": True}
ENCODER = {**GPT, "shape": "encoder", "n_token_types": 2}
MODELS = {
    "gpt": GPT,
    "llama": {**LLAMA, "attention_sinks": True},
    "windows": GEMMA,
    "longformer": {**LLAMA, "attention_kind": "window", "window": 4, "n_global": 3},
    "alibi": {**GPT, "position": "alibi"},
    "encoder": ENCODER,
    "prefix": LLAMA,
    "recomputed": LLAMA,
    "lora": GPT,
}
LENGTHS = (16, 13, 3)  # divided by four chunks, padded, and with a chunk of padding alone
PACKED = torch.tensor([[1] * 5 + [2] * 8, [1] * 9 + [2] * 2 + [0] * 2])
SHARED = torch.tensor([4, 2])  # tokens of a prompt that both documents of a row continue
Result = dict[str, Tensor]


def tokens_of(T: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels (2, T), of which some are ignored."""
    generator = torch.Generator().manual_seed(T)
    ids, labels = torch.randint(200, (2, 2, T), generator=generator)
    return ids, labels.masked_fill(torch.rand(2, T, generator=generator) < 0.2, IGNORED)


def losses(name: str, model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Losses of rows by the length, packed and whole, and of pairs; every rank must find the whole of each."""
    group, cases = model.context_group, {}

    def loss(T: int, segments: Tensor | None) -> Tensor:
        ids, labels = tokens_of(T)
        options = {"prefix": torch.tensor([min(T, 7), 0])} if name == "prefix" else {}
        options |= {"token_type_ids": ids % 2} if name == "encoder" else {}
        hidden, own = model.to_head(model.features(ids, segments, **options)), group.shard(labels, IGNORED)
        correct = masked_accuracy(hidden, model.lm_head.weight, own)
        return group.total(token_loss(hidden, model.lm_head.weight, own)) + group.total(correct)

    for T in LENGTHS if name == "llama" else LENGTHS[1:2]:
        cases[f"{T} tokens"] = lambda T=T: loss(T, None)
    if name not in ("prefix", "longformer"):  # their rows are whole
        cases["packed"] = lambda: loss(13, PACKED)

    def pairs() -> Tensor:
        ids, labels = tokens_of(13)
        batch = {"input_ids": ids, "labels": labels, "segment_ids": PACKED, "shared_prompt_len": SHARED}
        return (completion_logprobs(model, batch) * torch.tensor([[1.0, -2.0], [0.5, 3.0]])).square().sum()

    if name == "llama":
        cases["pairs"] = pairs
    return cases


def passes(name: str, model: nn.Module) -> Result:
    """Each loss, and the gradients of all parameters."""
    results: Result = {}
    for case, loss in losses(name, model).items():
        model.zero_grad()
        value = loss()
        value.backward()
        results[case] = value.detach()
        results |= {f"{case}: {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return results


SLOW = ("gpt", "longformer", "recomputed", "lora")
QUICK = tuple(name for name in MODELS if name not in SLOW)


def both(name: str, group: ContextGroup) -> tuple[Result, Result]:
    """What the ranks of a group find, their gradients added up, and what one process does."""
    torch.manual_seed(0)
    model = build_model(ModelConfig.from_dict(MODELS[name])).double()
    model = lora(model, target_modules="all-linear") if name == "lora" else model
    for parameter in model.parameters():  # norms and biases that do something
        parameter.data += 0.1 * torch.randn_like(parameter)
    expected = passes(name, copy.deepcopy(model))
    split_sequences(model, group)
    if name == "recomputed":
        recompute(model, 1)
    found = passes(name, model)
    for case, gradient in found.items():
        if ": " in case:
            dist.all_reduce(gradient)
    return found, expected


def compute(rank: int, size: int, folder: Path, names: tuple[str, ...]) -> None:
    """What one of some processes finds, in a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    torch.set_num_threads(1)
    group = ContextGroup.of(dist.group.WORLD)
    torch.save({name: both(name, group) for name in names}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def spawn(size: int, folder: Path, names: tuple[str, ...]) -> list[dict]:
    mp.spawn(compute, (size, folder, names), nprocs=size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def check(found: list[dict], name: str) -> None:
    for results in found:
        ours, right = results[name]
        assert ours.keys() == right.keys()
        for case, expected in right.items():
            assert (ours[case] - expected).abs().max() <= 1e-11 * expected.abs().max().clamp(min=1), case


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return spawn(2, tmp_path_factory.mktemp("two"), QUICK)


@pytest.mark.parametrize("name", QUICK)
def test_two_processes_find_the_losses_and_gradients_of_one(name: str, two: list[dict]) -> None:
    check(two, name)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "names"), [(2, SLOW), (4, tuple(MODELS))])
def test_more_processes_and_passes_find_them_too(size: int, names: tuple[str, ...], tmp_path: Path) -> None:
    found = spawn(size, tmp_path, names)
    for name in names:
        check(found, name)


def test_every_token_has_one_rank_and_every_rank_the_same_work_under_a_causal_mask() -> None:
    n, tokens = 4, torch.arange(64)
    shards = [ContextGroup(size=n, rank=rank).shard(tokens) for rank in range(n)]
    assert torch.cat(shards).sort().values.equal(tokens)
    assert {int((shard + 1).sum()) for shard in shards} == {int((tokens + 1).sum()) // n}  # keys that its queries see
    assert ContextGroup().shard(tokens) is tokens


OBJECTIVES = {
    "clm": ("model=llama", "model.n_head=4", "model.n_kv_head=2", "model.intermediate_size=64",
            "trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.05"),
    "sft": ("objective=sft", "data.path=chat.jsonl", "model.max_seq_len=30"),
    "dpo": ("objective=dpo", "data.path=pairs.jsonl", "optimizer.lr=0.03"),
    "kto": ("objective=kto", "data.path=liked.jsonl", "optimizer.lr=0.03"),
    "mlm": ("model=encoder_nano", "objective=mlm"),
    "orpo": ("objective=dpo", "objective.loss=orpo", "data.path=pairs.jsonl", "optimizer.lr=0.03"),
    "muon": ("optimizer=muon", "optimizer.lr=1e-3"),
}  # fmt: skip
TWO = ("trainer=fsdp", "trainer.devices=2", "strategy.context_parallel_size=2", WHOLE)
FOUR = {
    "four": ("trainer=fsdp", "trainer.devices=4", "strategy.context_parallel_size=4", WHOLE),
    "two by two": ("trainer=fsdp", "trainer.devices=4", "strategy.context_parallel_size=2", HALF),
    "copies": ("trainer=fsdp", "trainer.devices=4", "strategy.context_parallel_size=2", "strategy.replicate_size=2", HALF),
    "heads too": ("strategy=tensor_parallel", "trainer.devices=4", "strategy.context_parallel_size=2", WHOLE),
    "heads and states": ("strategy=tensor_parallel", "trainer.devices=4", "strategy.context_parallel_size=2",
                         "strategy.sequence_parallel=true", WHOLE),
}  # fmt: skip
NAMES = {
    "dpo": ("train/loss", "train/grad_norm", "val/loss", "val/rewards/accuracies", "rewards/margins"),
    "kto": ("train/loss", "train/grad_norm", "val/loss", "train/kl"),
    "orpo": ("train/loss", "train/grad_norm", "val/loss", "val/nll"),
}


@pytest.fixture(scope="module")
def rows(folder: Path) -> Path:
    """Conversations, pairs and liked answers of very different lengths."""
    texts = ["to be", "or not", "that is the question", "to be or not to be " * 2]
    kinds = {
        "chat": [{"prompt": a, "completion": f"{b} {n}"} for n in range(5) for a in texts for b in texts],
        "pairs": [
            {"prompt": a, "chosen": f"{b} {n}", "rejected": a[:3]} for n in range(5) for a in texts for b in texts
        ],
        "liked": [{"prompt": a, "completion": b, "label": n % 2 > 0} for n in range(5) for a in texts for b in texts],
    }
    for kind, examples in kinds.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    return folder


@pytest.mark.parametrize(
    "objective",
    ["clm", *(pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES if name != "clm")],
)
def test_two_processes_take_the_steps_of_one(objective: str, rows: Path, reference) -> None:
    run = rows / f"{objective}-two"
    train(rows, *SMALL, *OBJECTIVES[objective], *TWO, f"hydra.run.dir={run}")
    one = reference(objective)
    assert_same(run, one, NAMES.get(objective, SAME), rounding=1e-6)
    for step, row in table(one).items():
        assert table(run)[step]["train/tokens_seen"] == row["train/tokens_seen"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOUR)
@pytest.mark.parametrize("objective", ["clm", "sft", "dpo"])
def test_four_processes_take_the_steps_of_one(objective: str, layout: str, rows: Path, reference) -> None:
    if objective == "dpo" and layout.startswith("heads"):
        pytest.skip("tensor parallelism is for objectives that predict tokens")
    run = rows / f"{objective}-{list(FOUR).index(layout)}"
    train(rows, *SMALL, *OBJECTIVES[objective], *FOUR[layout], f"hydra.run.dir={run}")
    assert_same(run, reference(objective), NAMES.get(objective, SAME), rounding=1e-6)


def given(objective: str = "clm", **fields: object) -> tuple[type[BaseModule], list[nn.Module], int]:
    """The arguments of the check."""
    kind = {"clm": CausalLMModule, "dpo": PreferenceModule, "reward": RewardModule, "ppo": PPOModule}[objective]
    return kind, [build_model(ModelConfig.from_dict({**GPT, **fields}))], 2


REFUSED = {
    "is for objectives of tokens and preferences": ("reward", {}),
    "is for objectives of .*, not this one: set it to 1": ("ppo", {}),
    "model.position=relative": ("clm", {"position": "relative"}),
    "model.position=alibi does not go with pairs": ("dpo", {"position": "alibi"}),
    "model.attention_kind=performer": ("clm", {"attention_kind": "performer"}),
    "an encoder with model.window": ("clm", {"shape": "encoder", "window": 4}),
    "model.n_experts": ("clm", {"n_experts": 4, "expert_size": 8, "gated_mlp": True, "activation": "silu"}),
    "only decoders and encoders of our own": ("clm", {"shape": "encoder_decoder", "n_decoder_layer": 1}),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_divided_is_named(said: str) -> None:
    objective, fields = REFUSED[said]
    check_sequences(*given())
    with pytest.raises(ConfigError, match=said) as error:
        check_sequences(*given(objective, **fields))
    assert str(error.value).startswith("strategy.context_parallel_size (2)")


def test_virtual_tokens_and_sizes_that_do_not_fit_are_refused() -> None:
    objective, (model,), size = given()
    with pytest.raises(ConfigError, match="not peft=prompt"):
        check_sequences(objective, [prompt(model, n_tokens=2)], size)
    with pytest.raises(ConfigError, match="context_parallel_size=0: at least 1"):
        ShardedStrategy(context_parallel_size=0)
