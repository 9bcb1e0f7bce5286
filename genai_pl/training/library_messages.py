"""Messages of libraries that say nothing to a user of this project."""

import logging
import warnings


def silence_libraries() -> None:
    """Silence messages of Lightning and datasets on which a user cannot act."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for text in (
        "does not have many workers",
        "Checkpoint directory",
        "GPU available but not",
        "`srun` command is available",  # several processes need no srun: ours are started by the first
        "treespec, LeafSpec",
        "sync_dist=True",
        "callbacks used to create the checkpoint",  # those whose loss matters refuse it themselves
        "FSDP2-wrapped module",
        "but AMP with fp16 is not supported on CPU",  # refused
        "Detected call of `lr_scheduler.step",  # fp16 may skip the first step
    ):
        warnings.filterwarnings("ignore", f".*{text}.*")
