"""JSON files of a sentence-transformers folder: their names, their keys, and what of them is supported.

Settings that would change tokens or vectors and are not supported are a CheckpointError that names the module, so that no
folder is read into a model that gives other vectors than sentence-transformers does.
"""

from collections.abc import Mapping

from genai_pl.errors import CheckpointError

MODULES, POOLING = "modules.json", "1_Pooling/config.json"
TOKENS = tuple(  # files that may configure the Transformer module, in the order in which they are looked for
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
NAMES = ("sentence_embedding", "token_embeddings")
MODES = {  # pooling_mode -> a name of `pooling.KINDS`
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted",
    "lasttoken": "last",
}
FLAGS = {  # flags of older files -> the same, in the order in which the vectors are concatenated
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted",
    "pooling_mode_lasttoken": "last",
}
TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}
AFTER_POOLING = ("Dense", "LayerNorm", "Normalize", "Dropout")  # modules after the pooling
KEYS = {"max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name", "unpad_inputs"}
KEYS |= {"query_length", "document_length", "message_format"}  # for other tasks than a plain text
HARMLESS = {"torch_dtype", "dtype", "attn_implementation", "trust_remote_code", "revision", "device_map", "cache_dir"}


def modules(files: Mapping[str, object], where: str) -> list[tuple[str, str, dict]]:
    """Kind, path and settings of each module in turn: Transformer, Pooling, and those of AFTER_POOLING.

    files: JSON contents by path. where: the folder, for errors. CheckpointError for another order or kind.
    """
    # kind by kind: the first two are fixed
    entries, listing = [], files[MODULES]
    for entry in listing if isinstance(listing, list) else []:
        kind, path = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(path, str):
            raise CheckpointError(f"{where}/{MODULES}: a module needs a type and a path, not {entry}")
        library, *_, name = kind.split(".")
        allowed = ("Transformer", "Pooling")[len(entries) : len(entries) + 1] or AFTER_POOLING
        if library != "sentence_transformers" or name not in allowed or entry.get("kwargs"):
            raise CheckpointError(
                f"{where}/{MODULES}: module {path or len(entries)} ({kind}) is not supported; "
                f"here there may be {', '.join(allowed)}"
            )
        tokens = next((files[name] for name in TOKENS if files.get(name)), {})
        entries.append((name, path, files.get(f"{path}/config.json", {}) if entries else tokens))
    # the folder's own files configure the Transformer
    if len(entries) < 2:
        raise CheckpointError(f"{where}/{MODULES}: needs the modules Transformer and Pooling")
    if entries[0][1]:
        raise CheckpointError(
            f"{where}/{MODULES}: module {entries[0][1]}: the Transformer must lie in the folder itself"
        )
    return entries


def check_transformer(settings: dict, where: str) -> None:
    """CheckpointError for Transformer settings that would give other tokens or hidden states than the model alone."""
    unsupported = {name: value for name, value in settings.items() if name not in KEYS and _matters(value)}
    modality = settings.get("modality_config") or {"text": TEXT}
    if settings.get("transformer_task", "feature-extraction") != "feature-extraction":
        unsupported["transformer_task"] = settings["transformer_task"]
    if not isinstance(modality, dict) or "message" in modality or modality.get("text") != TEXT:
        unsupported["modality_config"] = modality
    if settings.get("module_output_name", NAMES[1]) != NAMES[1]:
        unsupported["module_output_name"] = settings["module_output_name"]
    length = settings.get("max_seq_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        unsupported["max_seq_length"] = length
    if unsupported:
        raise CheckpointError(f"{where}: the Transformer module's settings are not supported: {unsupported}")


def _matters(value: object) -> bool:
    """True for a setting that is neither empty nor about how files are loaded."""
    return bool(set(value) - HARMLESS) if isinstance(value, dict) else value not in (None, False, "", [])


def poolings(settings: dict, name: str) -> tuple[str, ...]:
    """The names of the poolings whose vectors are concatenated; mean where the file says nothing."""
    modes = settings.get("pooling_mode")
    if modes is None:
        return tuple(kind for flag, kind in FLAGS.items() if settings.get(flag)) or ("mean",)
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or any(mode not in MODES for mode in modes):
        raise CheckpointError(f"{name}: pooling_mode={settings['pooling_mode']} is not one of {', '.join(MODES)}")
    return tuple(MODES[mode] for mode in modes)
