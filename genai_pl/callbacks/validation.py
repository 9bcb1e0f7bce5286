"""The validation that was due at the step a run goes on from, and that its first part did not come to."""

import lightning as L


def validate_if_due(trainer: L.Trainer) -> None:
    """Validate if the step that was restored is one to validate at; Lightning takes it for validated."""
    if trainer.global_step == 0 or not trainer.enable_validation:
        return
    loop = trainer.fit_loop.epoch_loop
    if (loop.total_batch_idx + 1) % trainer.val_check_batch:
        return
    loop.val_loop.restarting = False  # from its first batch on
    first = trainer._logger_connector._first_loop_iter
    trainer.validating = True
    loop.val_loop.run()
    trainer.training = True
    trainer._logger_connector._first_loop_iter = first
