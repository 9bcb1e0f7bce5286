"""A small model that learns to call the calculator: its folder, conversations with calls, and questions to play with."""

import json
from pathlib import Path

from tests.serving.servers import write_model
from tests.training.test_environment_runs import TEMPLATE

QUESTION, CALL = "a?", {"type": "function", "function": {"name": "calculate", "arguments": {"expression": "1+1"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Compute.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}


def write_untrained(folder: Path) -> tuple[str, ...]:
    """Files in the folder: a model `untrained` whose template has a place for tools, `calls.jsonl` and `sums.jsonl`.

    Comes back with the options of a run that teaches the model from the calls: it asks the calculator and says the answer.
    """
    write_model(folder / "untrained", max_seq_len=256, init_std=0.05)  # two turns of 100 tokens
    (folder / "untrained" / "chat_template.jinja").write_text(TEMPLATE)
    talk = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "calculate", "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
    write(folder / "calls.jsonl", [{"messages": talk, "tools": [TOOL]}] * 32)
    write(folder / "sums.jsonl", [{"prompt": QUESTION, "answer": str(2 + n % 2)} for n in range(40)])
    return (
        *("objective=sft", "init_from=untrained", "data.path=calls.jsonl", "data.val_path=calls.jsonl"),
        *("data.seq_len=160", "data.batch_size=4", "optimizer=adamw", "optimizer.lr=1e-2", "scheduler=constant"),
        *("scheduler.warmup_steps=5", "trainer.max_steps=80", "trainer.limit_val_batches=1", "precision=fp32"),
        *("callbacks.samples.every_n_steps=null", "logger=csv"),
    )


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
