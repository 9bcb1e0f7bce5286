"""Labels: the names of a score head's outputs and what its numbers mean, in the words of transformers' config.json."""

from collections.abc import Mapping
from typing import NamedTuple

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = (SINGLE, MULTI, REGRESSION)
# keys of config.json that describe a head for scores; text_pairs is ours, the last of sentence-transformers' cross-encoders
# step_separator is ours: what ends a step where the head is that of a process reward model
KEYS = ("id2label", "label2id", "num_labels", "problem_type", "text_pairs", "sentence_transformers", "step_separator")
STEP_LABELS = ("incorrect", "correct")  # of a process reward model, whose reward is the probability of the second


class Labels(NamedTuple):
    """Names of the outputs of a head, in their order.

    problem_type: single_label_classification (softmax), multi_label_classification (a sigmoid each), regression (the
    numbers themselves); None where config.json is silent: one output is then a relevance (its sigmoid), several are classes
    pairs: whether the head is known to read two texts: a reranker, a classifier of pairs, a cross-encoder
    step_separator: text after each step of a process reward model, at whose last token the head is read; None for others
    """

    names: tuple[str, ...]
    problem_type: str | None = None
    pairs: bool = False
    step_separator: str | None = None

    @property
    def activation(self) -> str:
        """What makes probabilities of the outputs: softmax, sigmoid, or none; as transformers' pipelines choose."""
        if self.problem_type == REGRESSION:
            return "none"
        return "sigmoid" if self.problem_type == MULTI or len(self.names) == 1 else "softmax"

    def values(self) -> dict[str, object]:
        """The keys of config.json.

        >>> Labels(("no", "yes"), SINGLE).values()["label2id"]
        {'no': 0, 'yes': 1}
        """
        named = {"id2label": {str(n): name for n, name in enumerate(self.names)}}
        named["label2id"] = {name: n for n, name in enumerate(self.names)}
        if self.pairs:
            named["text_pairs"] = True
        if self.step_separator is not None:
            named["step_separator"] = self.step_separator
        return named if self.problem_type is None else {**named, "problem_type": self.problem_type}


def read_labels(values: Mapping[str, object], n_labels: int) -> Labels:
    """The labels that a config.json describes for a head of n_labels outputs; LABEL_0, LABEL_1, ... where it names none."""
    named = values.get("id2label")
    pairs = {str(n): str(name) for n, name in named.items()} if isinstance(named, Mapping) else {}
    names = tuple(pairs.get(str(n), f"LABEL_{n}") for n in range(n_labels))
    problem = values.get("problem_type")
    cross_encoder = values.get("sentence_transformers")
    activation = str(cross_encoder.get("activation_fn")) if isinstance(cross_encoder, Mapping) else ""
    if n_labels == 1 and problem is None and activation.endswith("Identity"):
        problem = REGRESSION  # a cross-encoder whose scores are used as they are
    pairs = values.get("text_pairs") is True or isinstance(cross_encoder, Mapping)
    separator = values.get("step_separator")
    separator = separator if isinstance(separator, str) and separator and n_labels == len(STEP_LABELS) else None
    return Labels(names, problem if problem in PROBLEM_TYPES else None, pairs, separator)
