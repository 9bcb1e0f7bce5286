"""Options without effect: rules about which options do nothing beside others, and the words typed against them.

A typed option that silently does nothing is the most expensive mistake of a long run: `generation.top_k=5` beside
`temperature=0` looks like a setting. Each command has a table of rules. A rule is about options as typed, not as
composed: defaults are allowed to have no effect. `train.py` prints an `unused` line and goes on; the other
commands, which are quick to type again, refuse.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import NamedTuple

from omegaconf import DictConfig

from genai_pl.config.model import EXPERT_FIELDS
from genai_pl.errors import ConfigError
from genai_pl.objectives.preference import WITH_REFERENCE

Condition = Callable[[DictConfig], bool]
SAMPLE_OPTIONS = ("callbacks.samples.prompts", "callbacks.samples.max_new_tokens", "generation.")
ADDRESSES = ("http://", "https://")
SIZE_FIELDS = {"shape", "n_layer", "n_decoder_layer", "n_head", "n_kv_head", "n_embd", "intermediate_size", "position"}
FREE_FIELDS = {
    "attention",
    "dropout",
    "max_seq_len",
    "balance_loss",
    "router_z_loss",
}  # fields of `model` that a loaded model takes


class Rule(NamedTuple):
    """One reason why options have no effect.

    options: names of options; one that ends in a dot stands for all options below it.
    holds: a function of the configuration, True where the reason applies.
    reason: the end of the sentence "OPTION=VALUE: has no effect: ...".
    """

    options: tuple[str, ...]
    holds: Condition
    reason: str


def _is(option: str, *values: object) -> Condition:
    """Condition that an option has one of the values; an option or group that does not exist counts as None."""

    def holds(config: DictConfig) -> bool:
        """The option's value, by its path, is among the values."""
        value: object = config
        for part in option.split("."):
            value = value.get(part) if isinstance(value, DictConfig) else None
        return value in values

    return holds


def _not(holds: Condition) -> Condition:
    """Condition that another does not hold."""
    return lambda config: not holds(config)


def _all(*conditions: Condition) -> Condition:
    """Condition that all of these hold."""
    return lambda config: all(holds(config) for holds in conditions)


def _objective(*names: str) -> Condition:
    """Condition that the objective's module is one of these classes."""
    return lambda config: config.objective._target_.rpartition(".")[2] in names


RL, PREFERENCE = _objective("GRPOModule", "PPOModule"), _objective("PreferenceModule")
TRAIN_RULES = (
    Rule(SAMPLE_OPTIONS, _all(_is("callbacks.samples.every_n_steps", None), _not(RL)), "no samples are written"),
    Rule(
        SAMPLE_OPTIONS, RL, "a policy is shown by its rollouts, which objective.temperature and max_new_tokens are for"
    ),
    Rule(("generation.max_new_tokens",), _not(RL), "samples are as long as callbacks.samples.max_new_tokens"),
    Rule(("callbacks.checkpoint.mode",), _is("callbacks.checkpoint.best", None), "callbacks.checkpoint.best=null"),
    Rule(("callbacks.early_stopping.",), _is("callbacks.early_stopping.patience", None), "patience=null stops nothing"),
    Rule(("eval.limit", "eval.batch_tokens"), _is("eval.every_n_steps", None), "eval.every_n_steps=null"),
    Rule(("plan.",), _is("dry_run", False), "it is for dry_run=true"),
    Rule(
        tuple(f"model.{field}" for field in EXPERT_FIELDS),
        _all(_is("model.n_experts", None, 0), _is("init_from", None)),
        "model.n_experts=null",
    ),
    Rule(
        ("data.path", "data.val_path"),
        lambda config: bool(config.data.get("sources")),
        "each of data.sources has its own",
    ),
    Rule(
        ("data.mix_by", "data.mix_temperature"),
        lambda config: not config.data.get("sources"),
        "data.sources=null: nothing is mixed",
    ),
    Rule(
        ("model.swiglu_alpha", "model.swiglu_limit"),
        _all(_not(_is("model.activation", "clamped_swiglu")), _is("init_from", None)),
        "only model.activation=clamped_swiglu has it",
    ),
    Rule(("data.block_rows", "data.val_documents"), _is("data.streaming", False), "data.streaming=false"),
    Rule(("data.val_documents",), _not(_is("data.val_path", None)), "data.val_path validates"),
    Rule(("data.val_fraction",), _not(_is("data.val_path", None)), "data.val_path validates"),
    Rule(("data.val_fraction",), _is("data.streaming", True), "data.val_documents of a stream validate"),
    Rule(
        ("objective.target_margin",), _all(PREFERENCE, _not(_is("objective.loss", "simpo"))), "only loss=simpo has it"
    ),
    Rule(("objective.nll_coef",), _all(PREFERENCE, _not(_is("objective.loss", "cpo"))), "only loss=cpo has it"),
    Rule(
        ("objective.label_smoothing",),
        _all(PREFERENCE, _not(_is("objective.loss", "sigmoid", "robust"))),
        "only loss=sigmoid and robust have it",
    ),
    Rule(
        ("objective.precompute_reference",),
        _all(PREFERENCE, _not(_is("objective.loss", *WITH_REFERENCE))),
        "this loss has no reference",
    ),
    Rule(("objective.reference_cache",), _is("objective.precompute_reference", False), "nothing is precomputed"),
    Rule(("objective.scale",), _is("objective.advantage", "rloo"), "objective.advantage=rloo divides by nothing"),
    Rule(
        ("objective.kl_horizon",),
        _all(_objective("PPOModule"), _is("objective.kl_target", None)),
        "objective.kl_target=null: kl_coef stays as it is",
    ),
    Rule(
        ("objective.temperature",),
        _all(_not(_is("resume", None)), _is("objective.learn_temperature", True)),
        "the checkpoint brings what was learned",
    ),
    Rule(("peft.init_text",), _not(_is("peft.init", "text")), "it is of peft.init=text"),
)
NO_BEAMS = _is("generation.num_beams", 1)
GREEDY = _is("generation.temperature", 0, 0.0)
WRITING_OPTIONS = ("generation.", "num_samples", "logprobs", "seed", "adapter_weights")
GENERATE_RULES = (
    Rule((*WRITING_OPTIONS, "top_k"), _is("embed", True), "embed=true writes nothing"),
    Rule((*WRITING_OPTIONS, "top_k"), _is("score", True), "score=true writes nothing"),
    Rule(("pooling",), _is("embed", False), "it is of embed=true"),
    Rule(("prompt_file",), _not(_is("prompt", None)), "prompt= is what is read"),
    Rule(("adapter_weights",), _is("adapter", None), "no adapter is given"),
    Rule(
        ("generation.top_k", "generation.top_p", "generation.min_p", "seed"),
        GREEDY,
        "generation.temperature=0 draws nothing",
    ),
    Rule(
        ("num_samples",),
        _all(GREEDY, NO_BEAMS, _not(_is("num_samples", 1))),
        "generation.temperature=0: all would be the same",
    ),
    Rule(
        ("generation.length_penalty", "generation.early_stopping", "generation.diversity_penalty"),
        NO_BEAMS,
        "generation.num_beams=1: there are no beams",
    ),
    Rule(
        ("generation.diversity_penalty",),
        _is("generation.num_beam_groups", 1),
        "generation.num_beam_groups=1: there are no other groups",
    ),
    Rule(
        ("generation.draft_tokens",),
        _all(_is("generation.draft", None), _is("generation.prompt_lookup", None)),
        "neither generation.draft nor generation.prompt_lookup proposes tokens",
    ),
)
ENCODER_RULE = Rule(
    (*WRITING_OPTIONS, "stream"), lambda config: not (config.embed or config.score), "an encoder fills in masks"
)
WRITER_RULE = Rule(
    ("top_k",), lambda config: not (config.embed or config.score), "it is of masks: give generation.top_k"
)
EVALUATE_RULES = (
    Rule(
        ("data.path", "data.columns", "data.column", "data.last_word", "data.stride", "data.bos", "batch_tokens"),
        _not(_is("tasks", None)),
        "tasks= bring their own data",
    ),
    Rule(("batch_size",), _is("tasks", None), "it is of tasks=; batches of data have batch_tokens"),
)
LABEL_OPTIONS = tuple(
    f"data.{name}" for name in ("text", "text_pair", "label", "tokens", "tags", "query", "document", "relevance")
)
NO_LABELS_RULE = Rule(LABEL_OPTIONS, lambda config: True, "they are columns of models with labels; set data.column")
NO_BOS_RULE = Rule(("data.bos",), lambda config: True, "these rows begin as the tokenizer and its template have it")
EXPORT_RULES = (
    Rule(("dtype", "quantize"), _is("format", "gguf_lora"), "format=gguf_lora has numbers in float32"),
    Rule(("dtype",), _is("format", "gguf"), "format=gguf has quantize= for the type of its numbers"),
    Rule(("dtype", "average"), _is("format", "peft"), "format=peft copies the adapter as it is"),
    Rule(("checkpoint",), _all(_is("format", "peft"), _not(_is("adapter", None))), "adapter= is what is copied"),
)


def _uses_endpoint(config: DictConfig) -> bool:
    """True if feedback.py calls an HTTP endpoint, as writer or as judge."""
    return any(str(name or "").startswith(ADDRESSES) for name in (config.checkpoint, config.judge))


def _uses_local_model(config: DictConfig) -> bool:
    """True if feedback.py loads a model, as writer or as judge; a judge option overrides the writer as judge."""
    names = [config.checkpoint] if config.task == "critique" else [config.judge or config.checkpoint, config.checkpoint]
    return any(not name.startswith(ADDRESSES) for name in names)


FEEDBACK_RULES = (
    Rule(
        (
            "judge",
            "rubric",
            "constitution",
            "judge_model",
            "key_variable",
            "retries",
            "workers",
            "generation.",
            "data.prompt",
            "data.first",
            "data.second",
        ),
        _is("task", "negatives"),
        "task=negatives compares vectors, and nobody writes or judges",
    ),
    Rule(("seed",), _all(_is("task", "negatives"), _is("negatives.sampling", "top")), "sampling=top draws nothing"),
    Rule(("negatives.", "data.anchor", "data.positive"), _not(_is("task", "negatives")), "it is of task=negatives"),
    Rule(
        ("judge", "rubric", "data.first", "data.second"),
        _is("task", "critique"),
        "task=critique: the model of checkpoint= judges itself",
    ),
    Rule(("constitution",), _is("task", "label"), "it is of task=critique"),
    Rule(("judge_model", "key_variable", "retries", "workers"), _not(_uses_endpoint), "no endpoint is asked"),
    Rule(
        ("generation.", "seed", "device"),
        _not(_uses_local_model),
        "endpoints write and judge, with settings of their own",
    ),
)


def unused_lines(config: DictConfig, typed: Iterable[str], rules: Iterable[Rule]) -> list[str]:
    """One line for each typed override (`key=value`) without effect, by the first rule that holds and covers it.

    Example line: `plan.gpu=cpu: has no effect: it is for dry_run=true`.
    """
    active_rules = [rule for rule in rules if rule.holds(config)]
    reasons: dict[str, str] = {}
    for argument in typed:
        key = argument.partition("=")[0].lstrip("+")
        for rule in active_rules:
            if any(_covers(key, option) for option in rule.options):
                reasons.setdefault(argument, rule.reason)
    return [f"{argument}: has no effect: {reason}" for argument, reason in reasons.items()]


def _covers(key: str, option: str) -> bool:
    """True if the option of a rule is this key, or a group (with its dot) that the key is in."""
    return key == option.removesuffix(".") or (option.endswith(".") and key.startswith(option))


def refuse_unused(config: DictConfig, typed: Iterable[str], rules: Iterable[Rule]) -> None:
    """ConfigError for the first typed override without effect."""
    for line in unused_lines(config, typed, rules):
        raise ConfigError(f"{line}; leave it out")


def refuse_other_model(
    wanted_config: Mapping[str, object] | object, loaded: object, typed: Iterable[str], *, source: str
) -> None:
    """ConfigError where a typed option of `model` contradicts the model that was loaded, whose own fields count.

    wanted_config: the composed group `model`, with derived sizes. loaded: the loaded model's configuration.
    source: the option that the model came from, for the message. Typing what the model has anyway is allowed,
    as are the fields that a loaded model takes over (attention backend, dropout, context).
    """
    for argument in typed:
        key = argument.partition("=")[0].lstrip("+")
        name = key.removeprefix("model.")
        # a whole group, model=gpt: compare the fields that make a size
        if key == "model":
            differences = [
                f.name
                for f in fields(wanted_config)
                if f.name in SIZE_FIELDS and _differs(wanted_config, loaded, f.name)
            ]
            if differences:
                difference = ", ".join(f"{n}={_value_of(getattr(loaded, n))}" for n in differences[:3])
                raise ConfigError(f"{argument}: has no effect: {source} is another model ({difference}); leave it out")
        elif key == "model.name":
            if not source.endswith(argument.partition("=")[2]):
                raise ConfigError(f"{argument}: has no effect: {source} is what is loaded; leave one of them out")
        elif key.startswith("model.") and name not in FREE_FIELDS and _differs(wanted_config, loaded, name):
            difference = f"has {name}={_value_of(getattr(loaded, name, None))}"
            raise ConfigError(f"{argument}: has no effect: {source} {difference}, and stays as it is; leave it out")


def _differs(wanted_config: object, loaded: object, name: str) -> bool:
    """True if a field is set in one configuration and has another value in the other."""
    return getattr(wanted_config, name, None) is not None and getattr(wanted_config, name) != getattr(
        loaded, name, None
    )


def _value_of(value: object) -> object:
    """The value of an enum's member; anything else as it is."""
    return getattr(value, "value", value)
