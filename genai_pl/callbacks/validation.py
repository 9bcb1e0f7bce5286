"""Validation on resuming: the one that was due at the step of the checkpoint and that the stopped run did not do."""

import lightning as L


def validation_is_due(trainer: L.Trainer) -> bool:
    """Whether the batch that has just ended is one to validate after."""
    loop = trainer.fit_loop.epoch_loop
    return bool(trainer.enable_validation) and not (loop.total_batch_idx + 1) % trainer.val_check_batch


def validate_if_due(trainer: L.Trainer) -> None:
    """Validate if the restored step is one to validate at.

    The checkpoint of a step is written before its validation, and Lightning takes the validation for done after
    loading it.
    """
    if trainer.global_step == 0 or not validation_is_due(trainer):
        return
    loop = trainer.fit_loop.epoch_loop
    loop.val_loop.restarting = False  # from its first batch on
    first = trainer._logger_connector._first_loop_iter
    trainer.validating = True
    loop.val_loop.run()
    trainer.training = True
    trainer._logger_connector._first_loop_iter = first
