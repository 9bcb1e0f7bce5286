"""Confusion picture: the counts of a validation by true and predicted class, as an image in TensorBoard."""

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from genai_pl.modules.base import BaseModule

CELL, MARGIN, MOST = 44, 110, 40  # pixels of a class and of the names; classes of a readable picture


class ConfusionPicture(L.Callback):
    """Draws `module.confusion` after every validation, under val/confusion."""

    def on_validation_end(self, trainer: L.Trainer, module: BaseModule) -> None:
        if module.confusion is None or not trainer.is_global_zero or len(module.confusion) > MOST:
            return
        picture = draw_confusion(module.confusion, module.labels.names)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("val/confusion", picture, trainer.global_step, dataformats="HWC")


def draw_confusion(counts: Tensor, names: tuple[str, ...]) -> np.ndarray:
    """A picture (height, width, 3) of counts (K, K): a row for each true class, darker where more of its rows are.

    names: of the classes; written beside the rows and above the columns, shortened to what fits.
    """
    from PIL import Image, ImageDraw

    K = len(names)
    shares = (counts.double() / counts.sum(1, keepdim=True).clamp(min=1)).tolist()
    image = Image.new("RGB", (MARGIN + K * CELL, MARGIN + K * CELL), "white")
    draw = ImageDraw.Draw(image)
    draw.text((4, 4), "true \\ predicted", fill="gray")
    for n, name in enumerate(names):
        shown = name.encode("latin-1", "replace").decode("latin-1")  # what the built-in font has
        draw.text((4, MARGIN + n * CELL + CELL // 3), shown[: MARGIN // 7], fill="black")
        draw.text((MARGIN + n * CELL + 3, MARGIN - 16 - 12 * (n % 3)), shown[: CELL // 5], fill="black")
    # cells: white for no row to dark blue for all rows of the class
    for row in range(K):
        for column in range(K):
            share, left, top = shares[row][column], MARGIN + column * CELL, MARGIN + row * CELL
            color = (int(255 - 225 * share), int(255 - 175 * share), int(255 - 75 * share))
            draw.rectangle((left, top, left + CELL - 2, top + CELL - 2), fill=color)
            text = f"{int(counts[row, column])}"
            draw.text((left + 5, top + CELL // 3), text, fill="white" if share > 0.5 else "black")
    return np.asarray(image)
