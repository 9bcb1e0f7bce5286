#!/usr/bin/env bash
# tokenizers 0.23.3: of two TemplateProcessing steps in one Sequence the second loses the text. It sees the parts that the
# first one made as the sequences of its own template, so a step that appends an end token after one that prepends a start
# token gives start and text without the end. Adding to the template that is there works.
# Seen: "a b" becomes ['<s>', 'a', 'b'], not ['<s>', 'a', 'b', '</s>'].
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q tokenizers==0.23.3
"$work/venv/bin/python" - <<'PY'
from tokenizers import Tokenizer, models, pre_tokenizers, processors

vocab = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}


def tokens(*steps):
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = steps[0] if len(steps) == 1 else processors.Sequence(list(steps))
    return tokenizer.encode("a b").tokens


def template(single):
    special = [(name, n) for name, n in vocab.items() if name in single.split()]
    return processors.TemplateProcessing(single=single, special_tokens=special)


two, one = tokens(template("<s> $A"), template("$A </s>")), tokens(template("<s> $A </s>"))
print("two steps:", two)
print("one step: ", one)
assert one == ["<s>", "a", "b", "</s>"]
assert two != one and "</s>" not in two
PY
echo "as found"
