"""The validation that was due at the step a run goes on from, and that its first part did not come to."""

import lightning as L


def validate_what_is_due(trainer: L.Trainer) -> None:
    """Validate if the step that was restored is one to validate at; Lightning takes it for validated."""
    loop = trainer.fit_loop.epoch_loop
    is_due = trainer.enable_validation and (loop.total_batch_idx + 1) % trainer.val_check_batch == 0
    if trainer.global_step == 0 or not is_due:
        return
    loop.val_loop.restarting = False  # from its first batch on
    first = trainer._logger_connector._first_loop_iter
    trainer.validating = True
    loop.val_loop.run()
    trainer.training = True
    trainer._logger_connector._first_loop_iter = first
