"""Options without effect of the objectives that align and distill: preferences, policies, teachers."""

from omegaconf import DictConfig

from genai_pl.endpoints import ADDRESSES
from genai_pl.objectives.preference import WITH_REFERENCE
from genai_pl.training.option_rules import Rule, all_hold, fails, is_one_of, objective_is

PREFERENCE = objective_is("PreferenceModule")
GROUPS, DISTILL = objective_is("GRPOModule"), objective_is("DistillModule")


def is_served(config: DictConfig) -> bool:
    """Whether the teacher is an address."""
    return str(config.objective.get("teacher", "")).startswith(ADDRESSES)


ALIGNMENT_RULES = (
    Rule(
        ("objective.target_margin",),
        all_hold(PREFERENCE, fails(is_one_of("objective.loss", "simpo"))),
        "only loss=simpo has it",
    ),
    Rule(
        ("objective.nll_coef",), all_hold(PREFERENCE, fails(is_one_of("objective.loss", "cpo"))), "only loss=cpo has it"
    ),
    Rule(
        ("objective.label_smoothing",),
        all_hold(PREFERENCE, fails(is_one_of("objective.loss", "sigmoid", "robust"))),
        "only loss=sigmoid and robust have it",
    ),
    Rule(
        ("objective.precompute_reference",),
        all_hold(PREFERENCE, fails(is_one_of("objective.loss", *WITH_REFERENCE))),
        "this loss has no reference",
    ),
    Rule(("objective.reference_cache",), is_one_of("objective.precompute_reference", False), "nothing is precomputed"),
    Rule(
        ("objective.scale",),
        all_hold(GROUPS, fails(is_one_of("objective.advantage", "group"))),
        "it is of advantage=group",
    ),
    Rule(
        ("objective.kl", "objective.kl_estimator"),
        all_hold(GROUPS, is_one_of("objective.beta", 0, 0.0)),
        "objective.beta=0: there is no KL penalty",
    ),
    Rule(
        ("objective.kl_estimator",),
        all_hold(GROUPS, is_one_of("objective.kl", "reward")),
        "kl=reward subtracts log-ratios",
    ),
    Rule(
        ("objective.clip_range",),
        all_hold(is_one_of("objective.loss", "cispo"), fails(is_one_of("objective.clip_range_high", None))),
        "loss=cispo bounds weights above alone, by clip_range_high",
    ),
    Rule(
        ("objective.environment_args", "objective.environment_args.", "objective.max_turns", "objective.tool_timeout"),
        all_hold(objective_is("GRPOModule", "PPOModule"), is_one_of("objective.environment", None)),
        "objective.environment=null",
    ),
    Rule(
        ("objective.reward_weights", "objective.reward_uncertainty", "objective.step_rewards"),
        all_hold(objective_is("GRPOModule", "PPOModule"), fails(is_one_of("objective.environment", None))),
        "the environment gives the rewards",
    ),
    Rule(
        ("objective.pass_score",),
        all_hold(objective_is("GRPOModule", "PPOModule"), is_one_of("objective.curriculum", 0, 0.0)),
        "objective.curriculum=0: no pass rates are measured",
    ),
    Rule(
        ("objective.kl_horizon",),
        all_hold(objective_is("PPOModule"), is_one_of("objective.kl_target", None)),
        "objective.kl_target=null: kl_coef stays as it is",
    ),
    Rule(("objective.server.",), all_hold(DISTILL, fails(is_served)), "objective.teacher is no address"),
    Rule(
        ("objective.server.top_k",),
        all_hold(DISTILL, fails(is_one_of("objective.top_k", None))),
        "objective.top_k tokens are written to disk",
    ),
    Rule(
        ("objective.teacher_cache",),
        all_hold(DISTILL, is_one_of("objective.top_k", None)),
        "top_k=null: nothing is written",
    ),
    Rule(
        ("objective.max_new_tokens", "objective.sampling_temperature", "objective.text_prompt_tokens"),
        all_hold(DISTILL, is_one_of("objective.student_fraction", 0, 0.0)),
        "student_fraction=0: the student writes nothing",
    ),
    Rule(
        ("objective.beta", "objective.temperature"),
        all_hold(DISTILL, is_one_of("objective.alpha", 1, 1.0)),
        "alpha=1: the teacher is not listened to",
    ),
    Rule(
        ("objective.beta",),
        all_hold(DISTILL, is_one_of("objective.universal", True)),
        "universal=true: sorted probabilities have one distance",
    ),
)

OF_RUNS = ("optimizer", "scheduler", "trainer", "callbacks", "logger", "eval", "generation", "plan", "strategy")
DISTILL_COMMAND_RULES = (
    Rule(
        tuple(f"{group}." for group in OF_RUNS),  # a group itself is covered too
        lambda config: True,
        "nothing is trained: give it to the train.py that reads the file",
    ),
    Rule(
        ("resume", "run_name", "dry_run", "init_layers", "compile", "profile", "output_dir"),
        lambda config: True,
        "there is no run, but the folder `out`",
    ),
    Rule(("objective.server.",), fails(is_served), "teacher is no address"),
    Rule(("objective.server.top_k",), is_served, "top_k is what is asked for"),
    Rule(("device", "precision."), is_served, "the teacher runs behind its address"),
)
