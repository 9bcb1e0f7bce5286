"""Decoding steps as CUDA graphs, with a recorder of operations in the place of torch.cuda.graph."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genai_pl.config.generation import GenerationConfig
from genai_pl.generation import decode, left_pad
from genai_pl.generation import decode as decode_function
from genai_pl.generation.captured_step import WORTH, CapturedSteps
from genai_pl.peft import lora, prefix

ROTARY = {"position": "rotary", "norm": "rmsnorm", "gated_mlp": True, "bias": False, "n_kv_head": 1}
N_NEW = WORTH + 8
UNEQUAL = [[3, 4, 5], [6, 7], [8, 9, 10, 11, 12], [13]]
EQUAL = [[3, 4, 5], [6, 7, 8]]


class Graph(TorchDispatchMode):
    """What a CUDA graph is: operations on tensors of fixed places, none of whose numbers is read while they are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "a stream that is captured is not read"
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Run every operation again, from the same tensors into the same tensors; no code of the function runs."""
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tensors(out), tensors(again), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():  # else a view, or in place
                    old.copy_(new)


def tensors(values: object) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class Recorder:
    """Records functions as `record_graph` does; replays: how often each graph has run."""

    def __init__(self) -> None:
        self.replays: list[int] = []

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()  # warm up
        graph, n = Graph(), len(self.replays)
        with graph:
            run()
        self.replays.append(0)

        def replay() -> None:
            self.replays[n] += 1
            graph.replay()

        return replay


def graphs(monkeypatch, *, faster: bool = True, recorder: Callable | None = None) -> Recorder:
    """Let decoding take graphs on this device; faster: what the clock says of them."""
    recorder = recorder or Recorder()
    readings = iter([1.0, 2.0] * 99 if faster else [2.0, 1.0] * 99)

    def clock(run: Callable[[], object]) -> float:
        run()
        return next(readings)

    def state(model, batch_size, n_tokens, row_weights, steps):
        assert steps is None  # this is a CPU
        return original(model, batch_size, n_tokens, row_weights, CapturedSteps(recorder, clock))

    module = __import__("sys").modules[decode_function.__module__]
    original = module.DecodeState
    monkeypatch.setattr(module, "DecodeState", state)
    return recorder


def written(model: nn.Module, prompts: list[list[int]], **options: object) -> tuple[Tensor, Tensor]:
    """Greedy tokens (N, steps) and their log-probabilities."""
    input_ids, segment_ids = left_pad(prompts, 0)
    logprobs: list[Tensor] = []
    config = GenerationConfig(max_new_tokens=N_NEW, temperature=0.0)
    with torch.inference_mode():
        steps = list(decode(model, input_ids, config, segment_ids=segment_ids, logprobs=logprobs, **options))
    return torch.stack(steps, 1), torch.stack(logprobs, 1)


@pytest.mark.parametrize("prompts", [EQUAL, UNEQUAL], ids=["equal", "padded"])
@pytest.mark.parametrize("options", [{}, ROTARY, {**ROTARY, "qk_norm": True}], ids=["gpt", "llama", "qwen"])
def test_replayed_steps_write_what_eager_ones_do(small_model: Callable, monkeypatch, options: dict, prompts: list):
    model = small_model(**options, max_seq_len=64)
    expected = written(model, prompts)
    recorder = graphs(monkeypatch)
    ours = written(model, prompts)
    assert torch.equal(ours[0], expected[0])
    torch.testing.assert_close(ours[1], expected[1], atol=1e-5, rtol=1e-5)
    # one is measured; the prefill is none, and the last column is read eagerly
    assert recorder.replays == [1 + N_NEW - 2]


def test_samples_of_a_prompt_and_rows_that_leave_are_recorded_anew(small_model: Callable, monkeypatch):
    model = small_model(**ROTARY, max_seq_len=128)
    monkeypatch.setattr("genai_pl.generation.captured_step.WORTH", 4)

    def run() -> Tensor:
        finished, steps = torch.zeros(16, dtype=torch.bool), []
        input_ids, segment_ids = left_pad(UNEQUAL, 0)
        config = GenerationConfig(max_new_tokens=20)
        given = {"segment_ids": segment_ids, "generator": torch.Generator().manual_seed(0), "num_samples": 4}
        for step in decode(model, input_ids, config, finished=finished, **given):
            steps.append(step)
            if len(steps) == 8:
                finished[:9] = True
        return torch.stack(steps, 1)

    expected = run()
    recorder = graphs(monkeypatch)
    assert torch.equal(run(), expected)
    assert len(recorder.replays) == 2
    assert min(recorder.replays) > 5


def test_a_row_that_outgrows_the_context_goes_on_with_a_new_cache(small_model: Callable, monkeypatch):
    monkeypatch.setattr("genai_pl.generation.captured_step.WORTH", 4)
    model = small_model(**ROTARY, max_seq_len=16)
    expected = written(model, EQUAL)
    recorder = graphs(monkeypatch)
    assert torch.equal(written(model, EQUAL)[0], expected[0])
    assert len(recorder.replays) > 2


def test_where_graphs_are_slower_all_steps_are_eager_and_a_line_says_so(small_model: Callable, monkeypatch, caplog):
    caplog.set_level("INFO")
    model = small_model(**ROTARY, max_seq_len=64)
    expected = written(model, EQUAL)
    recorder = graphs(monkeypatch, faster=False)
    assert torch.equal(written(model, EQUAL)[0], expected[0])
    assert recorder.replays == [1]
    assert "decoding    eager steps, as CUDA graphs are slower (2000.00 ms a token, eager 1000.00)" in caplog.messages


def test_a_step_that_cannot_be_recorded_is_eager_and_a_line_says_why(small_model: Callable, monkeypatch, caplog):
    caplog.set_level("INFO")

    def refuses(run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = small_model(**ROTARY, max_seq_len=64)
    expected = written(model, EQUAL)
    graphs(monkeypatch, recorder=refuses)
    assert torch.equal(written(model, EQUAL)[0], expected[0])
    assert "decoding    without CUDA graphs: operation not permitted when stream is capturing" in caplog.messages


@pytest.mark.parametrize(
    "options",
    [{"position": "alibi"}, {"window": 4}, {"n_experts": 4, "experts_per_token": 2}],
    ids=["alibi", "window", "experts"],
)
def test_models_whose_masks_or_sizes_a_graph_cannot_hold_are_eager(small_model: Callable, monkeypatch, options: dict):
    model = small_model(**options, max_seq_len=64)
    expected = written(model, EQUAL)
    recorder = graphs(monkeypatch)
    assert torch.equal(written(model, EQUAL)[0], expected[0])
    assert recorder.replays == []


def test_adapters_are_part_of_a_graph_and_virtual_tokens_are_eager(small_model: Callable, monkeypatch):
    adapted = lora(small_model(**ROTARY, max_seq_len=64), rank=2, alpha=4, target_modules=["q_proj"], dropout=0.0)
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.2)
    prefixed = prefix(small_model(**ROTARY, max_seq_len=64), n_tokens=2)
    expected = [written(model, UNEQUAL)[0] for model in (adapted, prefixed)]
    recorder = graphs(monkeypatch)
    assert torch.equal(written(adapted, UNEQUAL)[0], expected[0])
    assert len(recorder.replays) == 1
    assert torch.equal(written(prefixed, UNEQUAL)[0], expected[1])
    assert len(recorder.replays) == 1


def test_few_tokens_are_not_worth_a_graph(small_model: Callable, monkeypatch):
    recorder = graphs(monkeypatch)
    model = small_model(**ROTARY, max_seq_len=64)
    input_ids, _ = left_pad(EQUAL, 0)
    assert len(list(decode(model, input_ids, GenerationConfig(max_new_tokens=WORTH - 1)))) == WORTH - 1
    assert recorder.replays == []
