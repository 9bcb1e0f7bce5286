"""What a training needs, imported: the process that `tests/preloaded.py` forks commands from imports this module first."""

from importlib import import_module

from genai_pl.imports import collecting_later

MODULES = ("datasets", "tensorboard", "torch.distributed.fsdp", "torch.distributed.tensor.parallel")
MODULES += ("genai_pl.training.train", "genai_pl.exporting", "genai_pl.modules.clm", "tests.preloaded", "train")

with collecting_later():
    for name in MODULES:
        import_module(name)
