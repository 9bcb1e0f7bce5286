"""The probe of products on a CPU, against other shapes than its own."""

import time

import torch

from genai_pl.kernels import cpu_products


def test_the_probe_leaves_the_global_generator_and_autocast_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    cpu_products.bf16_speed_up.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu_products.bf16_speed_up() > 0
    assert torch.equal(torch.rand(3), expected)


def test_the_best_of_each_kind_counts_and_a_pause_of_the_machine_does_not(monkeypatch) -> None:
    clock = iter([0.0, 4.0, 10.0, 11.0, 20.0, 90.0, 100.0, 102.0] + [200.0, 300.0] * 8)  # seconds at each look
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    cpu_products.bf16_speed_up.cache_clear()
    assert cpu_products.bf16_speed_up() == 4.0  # 4 s for float32, 1 s for bfloat16
    cpu_products.bf16_speed_up.cache_clear()
