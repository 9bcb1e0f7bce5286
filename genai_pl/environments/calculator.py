"""Calculator environment: questions that a model answers with the help of a calculator and a search in a small text."""

import re
from collections.abc import Mapping

from genai_pl.environments.arithmetic import evaluate, number_text
from genai_pl.environments.environment import Environment, Messages, Observation

# a sign is none after a digit, a letter or a bracket; what is joined to another number is part of neither
NUMBER = re.compile(
    r"(?:(?<![\w)\]])-)?(?<![\w.,/])(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w/]|[.,]\d)"
)
WORD = re.compile(r"\w+")


class Calculator(Environment):
    """One question; the model may call `calculate` and `search` before it answers.

    system: a system message in front of the question, or None.
    answer: the column of the right answer, a number or a text.
    text: a column with lines to search in, which offers `search`; None where there are none.
    call_reward: reward of a call that works, once an episode; 0 rewards the answer alone.

    The score is 1 for an answer whose last number, or whose whole text, is the right one.
    """

    def __init__(
        self, system: str | None = None, answer: str = "answer", text: str | None = None, call_reward: float = 0.0
    ) -> None:
        self.system, self.answer, self.text, self.call_reward = system, answer, text, call_reward
        self.tools = [self.calculate] if text is None else [self.calculate, self.search]
        self.n_worked = 0

    def reset(self, row: Mapping[str, object]) -> Messages:
        """The question as messages, after the system message."""
        if self.answer not in row:
            raise ValueError(
                f"no column {self.answer!r} with the right answer: objective.environment_args={{answer: COLUMN}}"
            )
        self.right = str(row[self.answer])
        self.lines = [] if self.text is None else str(row.get(self.text) or "").splitlines()
        prompt = row["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return messages if self.system is None else [{"role": "system", "content": self.system}, *messages]

    def calculate(self, expression: str) -> str:
        """Compute the value of an arithmetic expression.

        Args:
            expression: Numbers with + - * / // % ** and brackets, and abs, min, max, round, sqrt, gcd, lcm: gcd(12, 18) * 2.
        """
        value = number_text(evaluate(expression))
        self.n_worked += 1
        return value

    def search(self, query: str) -> str:
        """Find the line of the text that has most words of a query.

        Args:
            query: Words to look for.
        """
        wanted = set(map(str.lower, WORD.findall(query)))
        scores = [len(wanted & set(map(str.lower, WORD.findall(line)))) for line in self.lines]
        if not any(scores):
            return "nothing found"
        self.n_worked += 1
        return self.lines[scores.index(max(scores))]

    def step(self, completion: str) -> Observation:
        """The end of the episode, with a reward for the right answer."""
        reward = float(is_right(completion, self.right)) + (self.call_reward if self.n_worked else 0.0)
        return Observation(reward=reward, done=True)

    def metrics(self) -> Mapping[str, float]:
        """Calls that gave a result."""
        return {"calls_worked": float(self.n_worked)}


def is_right(completion: str, right: str) -> bool:
    """Whether the last number of a text is the right one, or, where that is no number, the text itself.

    >>> is_right("So it is 1,234.", "1234"), is_right("12 or 13", "12"), is_right(" Paris ", "paris")
    (True, False, True)
    >>> is_right("It is 5-3", "-3"), is_right("1/2", "2"), is_right("1e3", "1000"), is_right(".5", "0.5")
    (False, False, True, True)
    """
    if NUMBER.fullmatch(right.strip()) is None:
        return completion.strip().lower() == right.strip().lower()
    found = NUMBER.findall(completion)
    return bool(found) and float(found[-1].replace(",", "")) == float(right.replace(",", ""))
