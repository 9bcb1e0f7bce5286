"""Guess the number: a text game whose observations say higher or lower."""

import random
import re
from collections.abc import Mapping

from genai_pl.environments.environment import Environment, Observation

NUMBER = re.compile(r"-?\d+")


class GuessNumber(Environment):
    """A whole number from `low` to `high` is to be found; each guess is answered with higher or lower.

    low, high: the range. guesses: most guesses of an episode. column: of the secret number; a row without it draws one.

    The score is 1 for the number found at the first guess, and less by 1 / guesses for each further one; 0 if it is
    not found. A guess that is no number costs as much as a wrong one.
    """

    def __init__(self, low: int = 1, high: int = 10, guesses: int = 4, column: str = "number") -> None:
        if not low < high or guesses < 1:
            raise ValueError("low must be below high, and guesses at least 1")
        self.low, self.high, self.guesses, self.column = low, high, guesses, column
        self.n_guesses, self.found = 0, False

    def reset(self, row: Mapping[str, object], seed: int) -> object:
        """The prompt of the row; the number is the row's, or drawn from the seed."""
        given = row.get(self.column)
        self.number = random.Random(seed).randint(self.low, self.high) if given is None else int(given)
        self.is_text = isinstance(row["prompt"], str)
        return row["prompt"]

    def step(self, completion: str) -> Observation:
        """Higher or lower, or the end."""
        self.n_guesses += 1
        match = NUMBER.search(completion)
        guess = None if match is None else int(match[0])
        if guess == self.number:
            self.found = True
            return Observation(reward=1 - (self.n_guesses - 1) / self.guesses, done=True)
        if self.n_guesses == self.guesses:
            return Observation(done=True)
        text = "Give a number." if guess is None else "Higher." if guess < self.number else "Lower."
        return Observation(f"\n{text}\n" if self.is_text else [{"role": "user", "content": text}])

    def metrics(self) -> Mapping[str, float]:
        """Whether the number was found, and the guesses made."""
        return {"found": float(self.found), "guesses": float(self.n_guesses)}
