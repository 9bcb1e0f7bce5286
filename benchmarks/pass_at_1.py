"""Small Python functions and their tests, to train on and to measure pass@1 by running them.

    python benchmarks/pass_at_1.py OUT
    python train.py data.path=OUT/functions.jsonl eval.tasks.code=OUT/tests.jsonl eval.execute_code=true ...

A function has a docstring and a body of one line, made of a pattern and two numbers or letters. The tests (HumanEval's
columns) are of functions whose numbers are not in the training set together with that pattern.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

N_TESTS = 100
REPEATS = 2  # of each function in the training set
NUMBERS, WORDS = (
    range(2, 40),
    ["sun", "moon", "sea", "tree", "rain", "wind", "fire", "sand", "leaf", "snow", "star", "rock"],
)
Pattern = tuple[str, str, str, Callable[..., object], list[object]]
# name, docstring, body, what it must give, arguments of the tests
PATTERNS: list[Pattern] = [
    ("scale", "Return x times {a} plus {b}.", "x * {a} + {b}", lambda x, a, b: x * a + b, [0, 1, 7, -3]),
    ("shift", "Return x plus {a} minus {b}.", "x + {a} - {b}", lambda x, a, b: x + a - b, [0, 5, -2]),
    ("clip", "Return x, at least {a} and at most {a} plus {b}.", "min(max(x, {a}), {a} + {b})",
     lambda x, a, b: min(max(x, a), a + b), [-9, 3, 20, 99]),
    ("divides", "Return whether x minus {a} can be divided by {b}.", "(x - {a}) % {b} == 0",
     lambda x, a, b: (x - a) % b == 0, [0, 4, 12, 39]),
    ("window", "Return {b} items of x from place {a} on.", "x[{a} : {a} + {b}]", lambda x, a, b: x[a : a + b],
     [list(range(9)), list(range(80)), []]),
    ("every", "Return every item of x from place {a} in steps of {b}.", "x[{a}::{b}]", lambda x, a, b: x[a::b],
     [list(range(9)), list(range(60)), []]),
    ("between", "Return the items of x above {a} and below {a} plus {b}.", "[n for n in x if {a} < n < {a} + {b}]",
     lambda x, a, b: [n for n in x if a < n < a + b], [list(range(80)), [3, 30, 9], []]),
    ("pad", "Return x with {a} zeros before and {b} after.", "[0] * {a} + x + [0] * {b}",
     lambda x, a, b: [0] * a + x + [0] * b, [[1, 2], []]),
    ("total", "Return the sum of x times {a}, plus {b}.", "sum(x) * {a} + {b}", lambda x, a, b: sum(x) * a + b,
     [[1, 2, 3], [], [-5]]),
    ("swap", "Return x with {a!r} in place of {b!r}.", "x.replace({b!r}, {a!r})", lambda x, a, b: x.replace(b, a),
     ["sun moon sea tree rain wind", "fire sand leaf", "snow star rock"]),
    ("wrap", "Return x after {a!r} and before {b!r}.", "{a!r} + x + {b!r}", lambda x, a, b: a + x + b, ["", "go", "sea"]),
    ("starts", "Return whether x begins with {a!r} or {b!r}.", "x.startswith(({a!r}, {b!r}))",
     lambda x, a, b: x.startswith((a, b)), ["sun and moon", "the sea", "rock", "wind and fire"]),
]  # fmt: skip


def functions() -> Iterator[tuple[Pattern, object, object, str]]:
    """Every pattern with each pair of two different numbers or words, and the function's name."""
    for pattern in PATTERNS:
        values = WORDS if "!r" in pattern[1] else NUMBERS
        for a, b in product(values, repeat=2):
            if a != b:
                yield pattern, a, b, pattern[0]


def head(pattern: Pattern, a: object, b: object) -> str:
    """The function up to its body."""
    return f'def {pattern[0]}(x):\n    """{pattern[1].format(a=a, b=b)}"""\n'


def tests_of(pattern: Pattern, a: object, b: object) -> str:
    """HumanEval's test: what the function gives for a few arguments."""
    lines = [f"    assert candidate({x!r}) == {pattern[3](x, a, b)!r}\n" for x in pattern[4]]
    return "def check(candidate):\n" + "".join(lines)


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    draw, every = random.Random(0), list(functions())
    draw.shuffle(every)
    # as many tests of each pattern
    held, counts = [], dict.fromkeys((pattern[0] for pattern in PATTERNS), 0)
    for function in every:
        if counts[function[3]] < -(-N_TESTS // len(PATTERNS)) and len(held) < N_TESTS:
            counts[function[3]] += 1
            held.append(function)
    chosen = {(name, a, b) for _, a, b, name in held}
    learned = [f for f in every if (f[3], f[1], f[2]) not in chosen] * REPEATS
    draw.shuffle(learned)
    texts = [{"text": head(p, a, b) + f"    return {p[2].format(a=a, b=b)}\n"} for p, a, b, _ in learned]
    tests = [
        {"task_id": f"{name}/{a}/{b}", "prompt": head(p, a, b), "test": tests_of(p, a, b), "entry_point": name}
        for p, a, b, name in held
    ]
    write(args.out / "functions.jsonl", texts)
    write(args.out / "tests.jsonl", tests)
    print(f"{args.out}: {len(texts):,} functions to learn, {len(tests)} with tests")


if __name__ == "__main__":
    main()
