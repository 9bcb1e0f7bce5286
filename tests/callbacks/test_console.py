"""What is printed: aligned lines and times that people can read."""

import pytest

from genai_pl.callbacks import Console, duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (42, "42s"), (59.6, "1m00s"), (185, "3m05s"), (3599.7, "1h00m"), (7805, "2h10m")]
)
def test_durations_read_as_people_write_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rows_are_aligned_under_their_headings(capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace

    console = Console()
    console._trainer = SimpleNamespace(max_steps=100)
    metrics = {"train/loss": 2.5, "train/lr": 1e-3, "train/grad_norm": 0.5, "train/tokens_per_sec": 12345.6}
    console.show(1, metrics)
    console.show(10, metrics)
    heading, first, second = capsys.readouterr().out.splitlines()
    assert len(heading) == len(first) == len(second)
    assert first.split()[:5] == ["1", "2.5000", "1.00e-03", "0.500", "12,346"]
    for name, value in (("loss", "2.5000"), ("lr", "1.00e-03"), ("tok/s", "12,346")):
        assert heading.index(name) + len(name) == first.index(value) + len(value)
