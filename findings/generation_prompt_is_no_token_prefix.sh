#!/usr/bin/env bash
# Llama 3's chat template with a tokenizer that splits text as GPT-2's does (tokenizers 0.23.3: ByteLevel with its default
# regex; transformers 5.23.0): the tokens of the generation prompt are NOT the first tokens of the conversation with the
# answer, even though the text is its prefix. At the end of a text "\n\n" is one piece, before a letter it is two, so a model
# that was trained on whole conversations is prompted with a token it never saw in that place. Llama 3's own regex keeps
# line breaks together and has no such seam.
# Seen: the prompt ends in [header, "\n\n"], the conversation goes on with "\n", "\n".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
"$work/venv/bin/pip" install -q --no-deps trl==1.16.0
"$work/venv/bin/python" - <<'PY'
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

folder = Path(find_spec("trl").origin).parent / "chat_templates"
SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tokens(pre_tokenizer):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["one\n\n", "two three\n\n"] * 50, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SPECIAL[0])
    fast.chat_template = (folder / "llama3.jinja").read_text()
    asked = [{"role": "user", "content": "Two?"}]
    whole = fast.apply_chat_template([*asked, {"role": "assistant", "content": "Four."}], tokenize=False)
    prompt = fast.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert whole.startswith(prompt)
    return [fast.tokenize(text) for text in (prompt, whole)]


prompt, whole = tokens(pre_tokenizers.ByteLevel(add_prefix_space=False))
print("GPT-2's regex:  ", prompt[-2:], "against", whole[len(prompt) - 2 : len(prompt) + 1])
assert prompt[-1] == "ĊĊ" and whole[: len(prompt)] != prompt

split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
prompt, whole = tokens(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))
print("Llama 3's regex:", prompt[-2:], "against", whole[len(prompt) - 2 : len(prompt) + 1])
assert prompt[-1] == "ĊĊ" and whole[: len(prompt)] == prompt
PY
echo "as found"
