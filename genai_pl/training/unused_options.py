"""Options without effect: rules about which options do nothing beside others, and the words typed against them.

A typed option that silently does nothing is the most expensive mistake of a long run: `generation.top_k=5` beside
`temperature=0` looks like a setting. Each command has a table of rules. A rule is about options as typed, not as
composed: defaults are allowed to have no effect. `train.py` prints an `unused` line and goes on; the other
commands, which are quick to type again, refuse.
"""

from collections.abc import Iterable

from omegaconf import DictConfig

from genai_pl.config.model import EXPERT_FIELDS
from genai_pl.config.tasks import NAMES
from genai_pl.endpoints import ADDRESSES
from genai_pl.errors import ConfigError
from genai_pl.training.alignment_rules import ALIGNMENT_RULES
from genai_pl.training.option_rules import Rule, all_hold, fails, is_one_of, objective_is

SAMPLE_OPTIONS = ("callbacks.samples.prompts", "callbacks.samples.max_new_tokens", "generation.")
RL = objective_is("GRPOModule", "PPOModule")
TRAIN_RULES = (
    Rule(
        SAMPLE_OPTIONS,
        all_hold(is_one_of("callbacks.samples.every_n_steps", None), fails(RL)),
        "no samples are written",
    ),
    Rule(
        SAMPLE_OPTIONS, RL, "a policy is shown by its rollouts, which objective.temperature and max_new_tokens are for"
    ),
    Rule(("generation.max_new_tokens",), fails(RL), "samples are as long as callbacks.samples.max_new_tokens"),
    Rule(
        ("callbacks.checkpoint.mode",), is_one_of("callbacks.checkpoint.best", None), "callbacks.checkpoint.best=null"
    ),
    Rule(
        ("callbacks.early_stopping.",),
        is_one_of("callbacks.early_stopping.patience", None),
        "patience=null stops nothing",
    ),
    Rule(("callbacks.notify.timeout",), is_one_of("callbacks.notify.url", None), "callbacks.notify.url=null"),
    Rule(
        ("eval.limit", "eval.batch_tokens", "eval.execute_code"),
        is_one_of("eval.every_n_steps", None),
        "eval.every_n_steps=null",
    ),
    Rule(("init_layers",), is_one_of("init_from", None), "init_from=null: the layers are new"),
    Rule(("plan.",), is_one_of("dry_run", False), "it is for dry_run=true"),
    Rule(
        tuple(f"model.{field}" for field in EXPERT_FIELDS),
        all_hold(is_one_of("model.n_experts", None, 0), is_one_of("init_from", None)),
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
        all_hold(fails(is_one_of("model.activation", "clamped_swiglu")), is_one_of("init_from", None)),
        "only model.activation=clamped_swiglu has it",
    ),
    Rule(("data.block_rows", "data.val_documents"), is_one_of("data.streaming", False), "data.streaming=false"),
    Rule(("data.val_documents",), fails(is_one_of("data.val_path", None)), "data.val_path validates"),
    Rule(("data.val_fraction",), fails(is_one_of("data.val_path", None)), "data.val_path validates"),
    Rule(("data.val_fraction",), is_one_of("data.streaming", True), "data.val_documents of a stream validate"),
    *ALIGNMENT_RULES,
    Rule(
        ("objective.temperature",),
        all_hold(fails(is_one_of("resume", None)), is_one_of("objective.learn_temperature", True)),
        "the checkpoint brings what was learned",
    ),
    Rule(("peft.init_text",), fails(is_one_of("peft.init", "text")), "it is of peft.init=text"),
)
NO_BEAMS = is_one_of("generation.num_beams", 1)
GREEDY = is_one_of("generation.temperature", 0, 0.0)
WRITING_OPTIONS = ("generation.", "num_samples", "logprobs", "seed", "adapter_weights")
GENERATE_RULES = (
    Rule((*WRITING_OPTIONS, "top_k"), is_one_of("embed", True), "embed=true writes nothing"),
    Rule((*WRITING_OPTIONS, "top_k"), is_one_of("score", True), "score=true writes nothing"),
    Rule(("pooling",), is_one_of("embed", False), "it is of embed=true"),
    Rule(("prompt_file",), fails(is_one_of("prompt", None)), "prompt= is what is read"),
    Rule(("adapter_weights",), is_one_of("adapter", None), "no adapter is given"),
    Rule(
        ("generation.top_k", "generation.top_p", "generation.min_p", "seed"),
        GREEDY,
        "generation.temperature=0 draws nothing",
    ),
    Rule(
        ("num_samples",),
        all_hold(GREEDY, NO_BEAMS, fails(is_one_of("num_samples", 1))),
        "generation.temperature=0: all would be the same",
    ),
    Rule(
        ("generation.length_penalty", "generation.early_stopping", "generation.diversity_penalty"),
        NO_BEAMS,
        "generation.num_beams=1: there are no beams",
    ),
    Rule(
        ("generation.diversity_penalty",),
        is_one_of("generation.num_beam_groups", 1),
        "generation.num_beam_groups=1: there are no other groups",
    ),
    Rule(
        ("generation.draft_tokens",),
        all_hold(is_one_of("generation.draft", None), is_one_of("generation.prompt_lookup", None)),
        "neither generation.draft nor generation.prompt_lookup proposes tokens",
    ),
    Rule(
        ("generation.cuda_graphs",),
        fails(all_hold(NO_BEAMS, is_one_of("generation.draft", None), is_one_of("generation.prompt_lookup", None))),
        "beams and proposed tokens are read without them",
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
        (
            *("data.path", "data.columns", "data.column", "data.last_word", "data.stride", "data.bos"),
            *("batch_tokens", "execute_code", "completions", *(f"data.{name}" for name in NAMES)),
        ),
        fails(is_one_of("tasks", None)),
        "tasks= bring their own data",
    ),
    Rule(("batch_size",), is_one_of("tasks", None), "it is of tasks=; batches of data have batch_tokens"),
)
LABEL_OPTIONS = tuple(
    f"data.{name}" for name in ("text", "text_pair", "label", "tokens", "tags", "query", "document", "relevance")
)
NO_LABELS_RULE = Rule(LABEL_OPTIONS, lambda config: True, "they are columns of models with labels; set data.column")
NO_BOS_RULE = Rule(("data.bos",), lambda config: True, "these rows begin as the tokenizer and its template have it")
EXPORT_RULES = (
    Rule(("dtype", "quantize"), is_one_of("format", "gguf_lora"), "format=gguf_lora has numbers in float32"),
    Rule(("dtype",), is_one_of("format", "gguf"), "format=gguf has quantize= for the type of its numbers"),
    Rule(("dtype", "average"), is_one_of("format", "peft"), "format=peft copies the adapter as it is"),
    Rule(
        ("checkpoint",),
        all_hold(is_one_of("format", "peft"), fails(is_one_of("adapter", None))),
        "adapter= is what is copied",
    ),
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
        is_one_of("task", "negatives"),
        "task=negatives compares vectors, and nobody writes or judges",
    ),
    Rule(
        ("seed",),
        all_hold(is_one_of("task", "negatives"), is_one_of("negatives.sampling", "top")),
        "sampling=top draws nothing",
    ),
    Rule(
        ("negatives.", "data.anchor", "data.positive"), fails(is_one_of("task", "negatives")), "it is of task=negatives"
    ),
    Rule(
        ("judge", "rubric", "data.first", "data.second"),
        is_one_of("task", "critique"),
        "task=critique: the model of checkpoint= judges itself",
    ),
    Rule(("constitution",), is_one_of("task", "label"), "it is of task=critique"),
    Rule(("judge_model", "key_variable", "retries", "workers"), fails(_uses_endpoint), "no endpoint is asked"),
    Rule(
        ("generation.", "seed", "device"),
        fails(_uses_local_model),
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
