"""Generative tasks: a model continues prompts, and its completions are matched, scored by a function or run against tests."""

from genai_pl.evaluation.generative.rows import GenerativeRow, read_answered, read_tested
from genai_pl.evaluation.generative.sandbox import Limits, Outcome, check_sandbox, describe_protections, run_program
from genai_pl.evaluation.generative.scorers import ExactMatch, ExecutedTests, FunctionScore, Scored, Scorer, normalize
from genai_pl.evaluation.generative.task import GenerativeTask, Keep, build_generative_task, measure_generative

__all__ = [
    "ExactMatch",
    "ExecutedTests",
    "FunctionScore",
    "GenerativeRow",
    "GenerativeTask",
    "Keep",
    "Limits",
    "Outcome",
    "Scored",
    "Scorer",
    "build_generative_task",
    "check_sandbox",
    "describe_protections",
    "measure_generative",
    "normalize",
    "read_answered",
    "read_tested",
    "run_program",
]
