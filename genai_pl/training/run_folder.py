"""The run folder: settings in `.hydra/`, the log, and the constraints that a checkpoint puts on a resume.

A resumed run must be the same run. Its checkpoint holds `fixed` (options that define the model, the data order and
the optimizer) and `data` (digests of the training files); `check_settings_unchanged` compares them with the
configuration of now, and names the first option that differs. What may change in the middle, such as the learning
rate, dropout or the number of steps, is not in there.
"""

import logging
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from genai_pl.atomic_io import write_atomic
from genai_pl.checkpoints.file import MARK, read_contents
from genai_pl.data import sources
from genai_pl.errors import CheckpointError, ConfigError, DataError
from genai_pl.training import output_folders as folders
from genai_pl.training import run_log
from genai_pl.training.hydra_job import job_overrides
from genai_pl.training.resume import TYPED_ARGUMENTS
from genai_pl.training.trust import key_of

log = logging.getLogger(__name__)

LOG = "train.log"
DATA = ("data.path", "data.val_path")
FREE = {  # options of the groups below that may change in the middle of a run
    *("model.dropout", "model.attention", "data.batch_size", "data.val_batch_size", "peft.init_from", "peft.dropout"),
    *("data.workers", "tokenizer.name", "model.name", *DATA),
}
GROUPS = ("model", "data", "tokenizer", "peft")


def keep_run_folder(run: Path) -> None:
    """Make the run folder permanent, and append to its train.log from here on. Called when the first step begins."""
    folders.keep_outputs()
    run_log.keep(run / LOG)


def write_settings(run: Path, config: DictConfig) -> None:
    """Write `.hydra/{config,hydra,overrides}.yaml` as Hydra would, but only once it is certain that there is a
    run.
    """
    files = {"config": config, "hydra": HydraConfig.instance().cfg, "overrides": job_overrides()}
    for name, values in files.items():
        text = OmegaConf.to_yaml(values if OmegaConf.is_config(values) else OmegaConf.create(values))
        write_atomic(run / ".hydra" / f"{name}.yaml", lambda path, text=text: path.write_text(text, encoding="utf-8"))


def resume_constraints(config: DictConfig) -> dict[str, object]:
    """What a checkpoint keeps of the configuration: `fixed`, option to value, and `data`, option to digest of its
    files or None.

    The batch size is free: the loader counts rows, not batches. Workers of a streamed data set are fixed,
    because each worker reads its own share of the documents.
    """
    settings: dict[str, object] = {"seed": config.seed}
    settings |= {f"{name}._target_": config[name]._target_ for name in ("objective", "optimizer")}
    for group in GROUPS:
        values = OmegaConf.to_container(config[group], resolve=True, enum_to_str=True)
        settings |= {f"{group}.{key}": value for key, value in values.items() if f"{group}.{key}" not in FREE}
    # of the sources of a mixture too, names and contents of files count apart
    paths = dict.fromkeys(DATA)
    if sources_ := settings.get("data.sources"):
        for name, source in sources_.items():
            paths |= {f"data.sources.{name}.{key}": source.pop(key, None) for key in ("path", "val_path")}
    else:
        paths = {option: OmegaConf.select(config, option) for option in DATA}
    streams = [config.data.get("streaming"), *(source.get("streaming") for source in (sources_ or {}).values())]
    if any(streams):  # workers share the documents
        settings["data.workers"] = config.data.workers
    return {"fixed": settings, "data": {option: _digest(path) for option, path in paths.items()}}


def check_settings_unchanged(constraints: dict[str, dict], checkpoint: Path, run: Path) -> None:
    """UserError where the run of `checkpoint` had other fixed settings, or other data, than `constraints` say.

    Changed file contents are accepted if the user types the data option again in this command: the run then
    goes on at the same position in other data. Options that an older checkpoint does not hold are not compared.
    """
    contents = read_contents(checkpoint)[MARK]
    stored_settings, stored_digests = contents.get("fixed", {}), contents.get("data", {})
    if not isinstance(stored_settings, dict) or not isinstance(stored_digests, dict):
        raise CheckpointError(f"{checkpoint}: refused, it does not say how its run was configured")
    # settings: the first that differs, with the way out
    for key, value in constraints["fixed"].items():
        if key in stored_settings and stored_settings[key] != value:
            raise ConfigError(
                f"{key}={value}: the run was begun with {stored_settings[key]}, which cannot change in its middle; "
                f"start another one from its weights with init_from={run}"
            )
    # data: same path, other contents
    typed_keys = {key_of(a) for a in TYPED_ARGUMENTS}
    for option, digest in constraints["data"].items():
        if digest is None or stored_digests.get(option, digest) == digest:
            continue  # missing data are reported by their reader
        if not any(option == key or option.startswith(f"{key}.") for key in typed_keys):
            raise DataError(
                f"{option}: its contents have changed since {checkpoint} was written; "
                f"type {option}= again to go on with what is there now"
            )
        log.info("changed     the contents of %s: the run goes on at its place in them", option)


def _digest(path: str | None) -> str | None:
    """Digest of the contents of the files that a data path names; None without a path, and for data of a user's
    own module.
    """
    if path is None:
        return None
    try:
        return sources.find_source(path).content
    except DataError:
        return None  # read by a data module of the user
