"""What a process imports before it needs it: each import of a large library is part of a second of every start."""

import gc
import json
import subprocess
import sys

import pytest

from genai_pl.imports import collecting_later
from tests.conftest import ROOT

LARGE = ("lightning", "transformers", "datasets", "pyarrow", "pandas", "sklearn", "torchmetrics", "tensorboard")
OF_TORCH = ("sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "triton")
COMMAND = "import runpy; sys.argv = {argv}; runpy.run_path('train.py', run_name='__main__')"


def imported(code: str) -> tuple[set[str], str]:
    """The modules that a process has imported at its end, and what it wrote to standard error."""
    code = f"import atexit, json, sys; atexit.register(lambda: print(json.dumps(list(sys.modules)))); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    return set(json.loads(done.stdout.splitlines()[-1])), done.stderr


def test_models_and_objectives_import_neither_dynamo_nor_lightning_nor_a_kernel_that_may_not_run() -> None:
    modules, errors = imported("import genai_pl.kernels, genai_pl.models, genai_pl.objectives, genai_pl.optim")
    assert not errors
    assert "torch" in modules
    assert modules.isdisjoint((*LARGE, *OF_TORCH))
    assert not {
        name for name in modules if name.startswith(("genai_pl.kernels.flash", "genai_pl.kernels.softmax_triton"))
    }


def test_serving_and_generating_import_no_trainer() -> None:
    model = "ModelConfig(vocab_size=8, n_layer=1, n_embd=8, n_head=1)"
    modules, errors = imported(
        "import genai_pl.serving.worker, genai_pl.cli.generate; from genai_pl.config.model import ModelConfig; "
        f"from genai_pl.models import build_empty; assert build_empty({model}).embed.weight.is_meta"
    )
    assert not errors
    assert modules.isdisjoint((*LARGE, "torch._dynamo", "torch._inductor"))


@pytest.mark.parametrize(
    ("argument", "line"),
    [("--help", ""), ("model.n_layr=1", "error: model.n_layr: no such option, did you mean n_layer?")],
)
def test_help_and_a_typo_are_answered_without_a_large_library(argument: str, line: str) -> None:
    modules, errors = imported(COMMAND.format(argv=["train.py", argument]))
    assert errors.strip() == line
    assert modules.isdisjoint(("torch", "numpy", *LARGE, *OF_TORCH))


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_collected_after_an_import_as_before_it(collects: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    (gc.enable if collects else gc.disable)()
    try:
        with collecting_later():
            assert not gc.isenabled()
            import colorsys  # noqa: F401
        assert gc.isenabled() == collects
    finally:
        gc.enable()
    assert gc.get_freeze_count() == 0


def test_ctrl_c_among_the_first_imports_is_one_line() -> None:
    code = """
import os, signal
from genai_pl.imports import ending_in_one_line
before = signal.getsignal(signal.SIGINT)
with ending_in_one_line():
    pass
assert signal.getsignal(signal.SIGINT) is before
with ending_in_one_line():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except BaseException:  # as a library may, in the middle of its import
        print("swallowed")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "stopped     by SIGINT\n")
