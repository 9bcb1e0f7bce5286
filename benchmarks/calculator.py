"""Accuracy on held-out school mathematics before and after GRPO in the environment `calculator`, with data and paired test.

    python benchmarks/calculator.py data SmolLM2-135M-Instruct school_math_train.jsonl school_math_test.jsonl OUT
    python benchmarks/calculator.py score sft_model grpo --data OUT/test.jsonl

`data` keeps the kinds of school mathematics that one expression answers with a number, and writes OUT/{sft,train,test}.jsonl
and OUT/base, the model under a chat template that has a place for tools. A row of sft.jsonl is a training problem with the
call that solves it; the expression is made of the problem's numbers, and kept if the calculator then gives its answer.
train.jsonl has the other training problems without calls, test.jsonl the held-out ones. `score` plays the test problems
greedily with each checkpoint, and compares every further one with the first on the same problems. Commands of the runs:
docs/alignment.md, Evidence.
"""

import argparse
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

Row = dict[str, object]
KINDS = (
    *(f"arithmetic__{name}" for name in ("add_or_sub", "mul", "div", "mixed", "add_sub_multiple", "mul_div_multiple")),
    *(f"numbers__{name}" for name in ("div_remainder", "gcd", "lcm", "place_value", "round_number")),
    "arithmetic__nearest_integer_root",
    "polynomials__evaluate",
)
LONGEST = 110  # characters of a problem
WORDS = [
    "ten",
    "hundred",
    "thousand",
    "ten_thousand",
    "hundred_thousand",
    "million",
    "ten_million",
    "hundred_million",
    "billion",
]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ROOTS = {
    "square": 2,
    "cube": 3,
    "third": 3,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "seventh": 7,
    "eighth": 8,
    "ninth": 9,
    "tenth": 10,
}
# the model says what the tools are in one line, and calls them in the format of Mistral, whose markers are the shortest
TEMPLATE = """{% if tools %}<|im_start|>system
Tools:{% for tool in tools %} {{ tool.function.name }}({{ tool.function.parameters.properties | join(', ') }}){% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.tool_calls %}{% for call in message.tool_calls %}[TOOL_CALLS]{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}{% else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""  # noqa: E501


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="write OUT/{sft,train,test}.jsonl and OUT/base")
    data.add_argument("model", type=Path, help="a Hugging Face folder")
    data.add_argument("train", type=Path, help="school_math_train.jsonl: title, prompt, completion")
    data.add_argument("test", type=Path, help="school_math_test.jsonl")
    data.add_argument("out", type=Path, help="the folder to write")
    data.add_argument("--calls", type=int, default=12, help="problems of each kind that SFT sees with their calls")
    score = commands.add_parser("score", help="greedy accuracy of checkpoints, compared with the first")
    score.add_argument("checkpoints", nargs="+", help="runs or folders; the first is what the others are compared with")
    score.add_argument("--data", type=Path, required=True, help="test.jsonl")
    score.add_argument("--limit", type=int, help="first problems only")
    score.add_argument("--new", type=int, default=56, help="tokens of a completion at most")
    score.add_argument("--out", type=Path, help="a .json file for what was right, by checkpoint")
    return parser.parse_args()


def expressions(kind: str, problem: str) -> Iterator[str]:
    """Expressions that may answer a problem of a kind, the likeliest first."""
    numbers = re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", problem)
    words = problem.lower().replace("-", " ")
    if kind.endswith(("mixed", "multiple")):
        found = max(re.findall(r"[-\d\s+*/().]+", problem), key=len).strip()
        yield found.rstrip(".").strip()
    elif kind.endswith("evaluate"):
        function = re.search(r"Let \w\((\w)\) = (.+?)\. .*\w\((-?\d+)\)", problem)
        if function:
            value = f"({function[3]})" if function[3].startswith("-") else function[3]
            yield function[2].replace(function[1], value)
    elif kind.endswith("root"):
        degree = re.search(r"power of 1/(\d+)", problem)
        named = next((n for name, n in ROOTS.items() if f"{name} root" in words), None)
        if degree or named:
            yield f"round({numbers[0]} ** (1/{degree[1] if degree else named}))"
    elif kind.endswith("place_value"):
        place = re.search(r"the ((?:\w+ )?\w+) digit", problem)
        if place:
            power = 0 if place[1] == "units" else WORDS.index(place[1].rstrip("s").replace(" ", "_")) + 1
            yield f"{numbers[-1]} // {10**power} % 10"
    elif kind.endswith("round_number"):
        yield from (
            f"round({numbers[0]}, {places})" for places in (_places(problem, words, numbers),) if places is not None
        )
    elif kind.endswith("lcm"):
        below = re.findall(r"/(\d+)", problem)
        yield f"lcm({', '.join(below if len(below) == 2 else numbers)})"
    elif kind.endswith("gcd"):
        yield f"gcd({', '.join(numbers)})"
    elif kind.endswith("remainder"):
        yield " % ".join(numbers)
    else:
        signs = {"arithmetic__mul": "*", "arithmetic__div": "/"}.get(kind, "+-")
        for sign, (a, b) in product(signs, (numbers[:2], numbers[1::-1])):
            yield f"{a} {sign} {f'({b})' if b.startswith('-') else b}"


def _places(problem: str, words: str, numbers: Sequence[str]) -> int | None:
    """The decimal places that a problem rounds to, below zero for tens and above, or None."""
    if match := re.search(r"to (\w+) (?:decimal places?|dps?)\b", problem):
        return int(match[1]) if match[1].isdigit() else DIGITS.index(match[1])
    if "nearest integer" in words:
        return 0
    if len(numbers) > 1:
        return 1 - len(numbers[1])
    match = re.search(r"nearest (?:one )?([a-z ]+)", words.rstrip("?."))
    return -1 - WORDS.index(match[1].strip().replace(" ", "_")) if match else None


def solved(row: Row) -> str | None:
    """The first expression whose value is the answer, or None."""
    from genai_pl.environments.arithmetic import evaluate, number_text
    from genai_pl.environments.calculator import is_right

    for expression in expressions(str(row["title"]), str(row["prompt"])):
        try:
            if is_right(number_text(evaluate(expression)), str(row["answer"])):
                return expression
        except ValueError:
            continue
    return None


def problems(path: Path) -> list[Row]:
    """The problems of a file that have a number as their answer, with the columns title, prompt and answer."""
    from genai_pl.environments.calculator import NUMBER

    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [
        {"title": row["title"], "prompt": row["prompt"], "answer": row["completion"]}
        for row in rows
        if row["title"] in KINDS and len(row["prompt"]) <= LONGEST and NUMBER.fullmatch(row["completion"])
    ]


def conversation(row: Row, expression: str, tools: Sequence[Mapping[str, object]]) -> Row:
    """A problem with the call that solves it, what the calculator says, and the answer."""
    from genai_pl.environments.arithmetic import evaluate, number_text

    call = {
        "id": "call00001",
        "type": "function",
        "function": {"name": "calculate", "arguments": {"expression": expression}},
    }
    return {
        "tools": tools,
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {
                "role": "tool",
                "tool_call_id": "call00001",
                "name": "calculate",
                "content": number_text(evaluate(expression)),
            },
            {"role": "assistant", "content": row["answer"]},
        ],
    }


def write_data(args: argparse.Namespace) -> None:
    """Write the three files and the model's folder, and say how many there are of each."""
    from genai_pl.data.tool_schemas import function_schema
    from genai_pl.environments.calculator import Calculator

    train, test = problems(args.train), problems(args.test)
    random.Random(0).shuffle(train)
    tools, calls, rest = [function_schema(Calculator().calculate, "calculate")], [], []
    taken = dict.fromkeys(KINDS, 0)
    for row in train:
        expression = solved(row) if taken[row["title"]] < args.calls else None
        taken[row["title"]] += expression is not None
        calls += [conversation(row, expression, tools)] if expression else []
        rest += [] if expression else [row]
    base = args.out / "base"
    base.mkdir(parents=True, exist_ok=True)
    for file in args.model.iterdir():
        if not (base / file.name).exists() and file.name != "chat_template.jinja":
            (base / file.name).symlink_to(file.resolve())
    (base / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    for name, rows in {"sft": calls, "train": rest, "test": test}.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    solvable = sum(solved(row) is not None for row in test)
    print(
        f"{len(calls)} with calls, {len(rest)} to train on, {len(test)} held out, of which rules alone solve {solvable}"
    )


def play(checkpoint: str, rows: Sequence[Row], new: int) -> tuple[list[bool], list[str]]:
    """(whether each problem was answered right, completions) by greedy decoding in the environment."""
    import torch

    from genai_pl.config.generation import GenerationConfig
    from genai_pl.data import special_tokens
    from genai_pl.data.turns import Turns
    from genai_pl.environments.calculator import Calculator
    from genai_pl.environments.episode import Rules
    from genai_pl.loading import load
    from genai_pl.modules.episodes import play_episodes

    model, tokenizer, _ = load(checkpoint)
    known = special_tokens(tokenizer, model.config.vocab_size)
    rules = Rules("calculator", Turns(tokenizer), max_turns=2, max_new_tokens=new, context=512, tool_timeout=5.0)
    right, texts, size = [], [], 64
    order = sorted(range(len(rows)), key=lambda i: len(str(rows[i]["prompt"])))
    model.eval()
    for start in range(0, len(rows), size):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            rollout, _ = play_episodes(
                model, [rows[i] for i in order[start : start + size]], Calculator, rules,
                GenerationConfig(max_new_tokens=new, temperature=0.0), copies=1, share_prompts=False,
                generator=torch.Generator().manual_seed(0), ends={known.end, *model.config.eos_token_ids}, pad=known.pad,
                decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
            )  # fmt: skip
        right += (rollout.turn_rewards.sum(1) > 0).tolist()
        texts += [tokenizer.decode(row) for row in rollout.completions]
    places = sorted(range(len(rows)), key=lambda i: order[i])
    return [right[i] for i in places], [texts[i] for i in places]


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided p-value of McNemar's exact test: of so uneven a split of the problems whose answer changed."""
    n, k = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def score(args: argparse.Namespace) -> None:
    """Print the accuracy of each checkpoint with Wilson's interval, and McNemar's exact test against the first."""
    from genai_pl.evaluation.metrics import wilson

    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()][: args.limit]
    answers: dict[str, object] = {}
    first: list[bool] = []
    for name in args.checkpoints:
        right, texts = play(name, rows, args.new)
        first = first or right
        low, high = wilson(sum(right) / len(right), len(right))
        line = f"{name}: {sum(right) / len(right):.3f} ({low:.3f} to {high:.3f}) of {len(right)}"
        gained = sum(b and not a for a, b in zip(first, right, strict=True))
        lost = sum(a and not b for a, b in zip(first, right, strict=True))
        if gained + lost:
            line += f"; {gained} turned right, {lost} wrong, p = {mcnemar(gained, lost):.1e}"
        print(line, flush=True)
        for kind in KINDS if len(rows) > 100 else ():
            of_kind = [r for r, row in zip(right, rows, strict=True) if row["title"] == kind]
            print(f"    {kind}: {sum(of_kind)} of {len(of_kind)}")
        answers[name] = [{"right": r, "text": t} for r, t in zip(right, texts, strict=True)]
    if args.out:
        args.out.write_text(json.dumps(answers, indent=1), encoding="utf-8")


def main() -> None:
    args = parse()
    write_data(args) if args.command == "data" else score(args)


if __name__ == "__main__":
    main()
