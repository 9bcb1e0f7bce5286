#!/usr/bin/env bash
# lightning 2.6.6: a step at which a checkpoint is written and a validation is due writes the checkpoint first. A run that ends
# between the two (out of time, killed) and goes on from this checkpoint never validates there: the restored loop takes the
# validation for done. So its curve has a hole, and a callback that watches val/loss, early stopping or "save the best", decides
# otherwise than in the uninterrupted run.
# Seen: validations at steps [4, 8] uninterrupted; ended in the validation of step 4 and resumed, only at [8].
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy lightning==2.6.6
cd "$work"
cat > run.py <<'PY'
import logging
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class OutOfTime(Exception):
    pass


class Line(L.LightningModule):
    def __init__(self, ends_at=None):
        super().__init__()
        self.layer, self.ends_at, self.validated = torch.nn.Linear(2, 1), ends_at, []

    def training_step(self, batch, _):
        return self.layer(batch[0]).mean()

    def validation_step(self, batch, _):
        pass

    def on_validation_start(self):
        if self.global_step == self.ends_at:
            raise OutOfTime
        self.validated.append(self.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(folder, *, ends_at=None, checkpoint=None):
    model = Line(ends_at)
    trainer = L.Trainer(
        max_steps=8, val_check_interval=4, check_val_every_n_epoch=None, num_sanity_val_steps=0, accelerator="cpu",
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1)],
    )
    rows = [DataLoader(TensorDataset(torch.ones(n, 2)), batch_size=1) for n in (8, 2)]
    try:
        trainer.fit(model, *rows, ckpt_path=checkpoint)
    except OutOfTime:
        pass
    return model.validated


whole = run("whole")
assert run("part", ends_at=4) == []
(checkpoint,) = Path("part").iterdir()
resumed = run("part", checkpoint=checkpoint)
print("uninterrupted:", whole, checkpoint.name, "resumed:", resumed)
assert whole == [4, 8] and resumed == [8]
PY
OMP_NUM_THREADS=1 "$work/venv/bin/python" run.py
echo "as found"
