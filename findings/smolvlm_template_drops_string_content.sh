#!/usr/bin/env bash
# SmolVLM's and Idefics3's chat templates (as TRL 1.16.0 ships them, transformers 5.23.0) lose a message whose content is a
# string: `for line in message['content']` walks over its characters, none of which has a type, and Jinja says nothing.
# The same message as a list of parts is rendered. LLaVA-NeXT's template raises on the string instead.
# Seen: "User: <end_of_utterance>\nAssistant: <end_of_utterance>\n", without either text.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 jinja2==3.1.6
"$work/venv/bin/pip" install -q --no-deps trl==1.16.0
"$work/venv/bin/python" - <<'PY'
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

folder = Path(find_spec("trl").origin).parent / "chat_templates"
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))


def rendered(template, as_parts):
    tokenizer.chat_template = (folder / f"{template}.jinja").read_text()
    messages = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
    if as_parts:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    return tokenizer.apply_chat_template(messages, tokenize=False)


for template in ("smolvlm", "idefics3"):
    as_string, as_parts = rendered(template, False), rendered(template, True)
    print(f"{template}: string {as_string!r}")
    print(f"{template}: parts  {as_parts!r}")
    assert "Four." not in as_string and "Two and two?" not in as_string
    assert "Four." in as_parts and "Two and two?" in as_parts
PY
echo "as found"
