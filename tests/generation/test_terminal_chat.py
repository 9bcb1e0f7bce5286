"""A chat in the terminal, or through a pipe, gives the answers of transformers' chat template and greedy decoding."""

import io
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from genai_pl.cli import chat as terminal
from genai_pl.data.prompt_tokens import ensure_template
from genai_pl.errors import ConfigError
from genai_pl.generation.conversation import Conversation
from genai_pl.models import Decoder, save_pretrained
from genai_pl.peft import lora, save_adapter

GREEDY = ("generation=greedy", "generation.max_new_tokens=12")
THINKING = (  # as Qwen3's: thoughts of earlier turns are left out
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def talker(byte_level_tokenizer) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of bytes, an end token and a ChatML template."""
    tokenizer = byte_level_tokenizer(eos_token="<eos>")
    ensure_template(tokenizer)
    return tokenizer


@pytest.fixture
def folder(small_model: Callable[..., Decoder], talker, tmp_path: Path) -> Path:
    """A random GPT-2 with a ChatML template."""
    path = tmp_path / "model"
    save_pretrained(small_model(max_seq_len=256), path, token_ids={"eos_token_id": 256})
    talker.save_pretrained(path)
    return path


@pytest.fixture
def bare(small_model: Callable[..., Decoder], byte_tokenizer, tmp_path: Path) -> Path:
    """The same folder without a chat template."""
    path = tmp_path / "bare"
    save_pretrained(small_model(), path, token_ids={"eos_token_id": 256})
    byte_tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def chat(folder, command, monkeypatch: pytest.MonkeyPatch):
    """`chat(lines, *arguments)`: the output of generate.py for lines that are piped into it."""

    def call(lines: str, *arguments: str):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return command("generate", "checkpoint=model", "chat=true", *GREEDY, *arguments)

    return call


def theirs(folder: Path, messages: list[dict[str, str]]) -> str:
    """The greedy answer of transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ends = [256, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    output_ids = model.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=ends, pad_token_id=256)
    return tokenizer.decode(output_ids[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).rstrip("\ufffd")


def test_piped_turns_are_answered_as_transformers_renders_and_continues_them(folder, chat, tmp_path):
    result = chat('hi\n"""\nand\nthen?\n"""\n/save talk.jsonl\n', "system=Be brief.")
    assert result.status == 0
    messages = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert [(m["role"], m["content"]) for m in messages if m["role"] != "assistant"] == [
        ("system", "Be brief."),
        ("user", "hi"),
        ("user", "and\nthen?"),
    ]
    for n in (2, 4):
        assert messages[n]["content"] == theirs(folder, messages[:n])
    assert result.out == f"{messages[2]['content']}\n{messages[4]['content']}\n"


def test_turns_may_come_from_the_prompt_or_a_file_and_answers_may_come_whole(folder, chat, tmp_path):
    expected = theirs(folder, [{"role": "user", "content": "hi"}])
    assert chat("", "prompt=hi").out == f"{expected}\n"
    assert chat("", "prompt=hi", "stream=false").out == f"{expected}\n"
    (tmp_path / "turns.txt").write_text("hi\nand then?\n")
    assert chat("", "prompt_file=turns.txt").out == chat("hi\nand then?\n").out


def test_reset_forgets_and_exit_ends(folder, chat):
    once, anew = chat("hi\n"), chat("well\n/reset\nhi\n/exit\nnever read\n")
    assert anew.out.endswith(once.out)
    assert anew.out.count("\n") == 2 + anew.out.count("\n\n")
    assert "forgotten" in anew.err


def test_an_adapter_answers_as_it_does_through_the_rendered_prompt(folder, chat, command, small_model, talker):
    model = lora(small_model(max_seq_len=256), rank=2)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save_adapter(model, Path("adapter"), base="model")
    adapter_answer = chat("hi\n", "adapter=adapter").out
    rendered = talker.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    completed = command("generate", "checkpoint=model", "adapter=adapter", *GREEDY, f"prompt={rendered}")
    assert completed.out == rendered + adapter_answer
    assert adapter_answer != chat("hi\n").out


def test_the_oldest_turns_are_left_out_with_a_line_once_they_do_not_fit(talker):
    conversation = Conversation(talker, context=100, system="s")
    shown = [{"role": "system", "content": "s"}]
    for n, text in enumerate(("first", "second", "third", "fourth")):
        prompt = conversation.prompt(text, max_new_tokens=10)
        shown = shown[:1] + shown[1 + prompt.n_dropped :]
        expected = talker.apply_chat_template([*shown, {"role": "user", "content": text}], add_generation_prompt=True)
        assert prompt.tokens == expected["input_ids"]
        assert len(prompt.tokens) <= 90
        assert (prompt.n_dropped > 0) == (n >= 2)
        conversation.add(text, "answer", prompt.n_dropped)
        shown += [{"role": "user", "content": text}, {"role": "assistant", "content": "answer"}]
    assert len(conversation.messages) == 8  # all of them can be saved


def test_what_was_left_out_and_what_was_cut_is_said(folder, chat):
    long = "word " * 16
    result = chat(f"{long}\n{long}\n{long}\n", "generation.logit_bias={256:-100,257:-100,258:-100}")
    assert "the oldest 2 messages do not fit into the context any more and are left out" in result.err
    assert "the answer was cut: generation.max_new_tokens=12" in result.err


def test_a_message_that_cannot_fit_is_one_line(folder, chat):
    result = chat(f"{'x' * 300}\n")
    assert result.status == 2
    assert result.err.startswith("error: the message has 3")
    assert "the context is 256, of which an answer takes 12: shorten it" in result.err


def test_thoughts_are_kept_in_what_is_saved_and_shown_again_as_the_template_says(talker):
    talker.chat_template = THINKING
    conversation = Conversation(talker, context=1000)
    conversation.add("two and two?", "let me see\n</think>\n\nfour", 0)
    tokens = conversation.prompt("sure?", max_new_tokens=10).tokens
    expected = talker.apply_chat_template(
        [*conversation.messages, {"role": "user", "content": "sure?"}], add_generation_prompt=True, tokenize=False
    )
    assert talker.decode(tokens) == expected
    assert "let me see" not in expected
    assert conversation.messages[1]["content"] == "let me see\n</think>\n\nfour"


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch):
    """Lines typed at a terminal, where Ctrl-C is an entry of its own."""

    def give(*lines: str | type[BaseException]) -> None:
        rest = iter(lines)

        def read(prompt: str) -> str:
            line = next(rest, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr("builtins.input", read)

    return give


def test_ctrl_c_stops_an_answer_which_is_kept_and_a_second_one_ends(folder, command, typed, monkeypatch, tmp_path):
    complete = terminal.complete

    def stopped(*args: object, on_text: Callable[[int, str], None], **options: object) -> object:
        def show(n: int, piece: str) -> None:
            on_text(n, piece)
            signal.raise_signal(signal.SIGINT)

        return complete(*args, on_text=show, **options)

    monkeypatch.setattr(terminal, "complete", stopped)
    typed("hi", "/save talk.jsonl", "hi", KeyboardInterrupt, "never read")
    before = signal.getsignal(signal.SIGINT)
    result = command("generate", "checkpoint=model", "chat=true", *GREEDY)
    assert result.status == 130
    assert result.err.count("stopped; Ctrl-C once more ends") == 2
    _, answer = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    whole = theirs(folder, [{"role": "user", "content": "hi"}])
    assert answer["content"]
    assert whole.startswith(answer["content"])
    assert len(answer["content"]) < len(whole)
    assert signal.getsignal(signal.SIGINT) is before


def test_slips_at_the_terminal_do_not_end_the_conversation(folder, command, typed):
    typed("/sav x", "/save", "/save no/where.jsonl", "x" * 300, "/help", "", "hi", KeyboardInterrupt, "/save no/where")
    result = command("generate", "checkpoint=model", "chat=true", *GREEDY)
    assert result.status == 0  # Ctrl-D
    for message in (
        "/sav: no such command; there are /help, /reset, /save FILE and /exit",
        "/save FILE: name a file",
        "/save: nothing was said yet",
        "the message has 3",
        "append the conversation to a file",
        "/save no/where: cannot be written (No such file or directory)",
    ):
        assert message in result.err
    assert result.out.strip() == theirs(folder, [{"role": "user", "content": "hi"}]).strip()


MISTAKES = {
    "embed=true": "embed=true and chat=true: choose one of them",
    "num_samples=2": "chat=true: an answer is one",
    "adapter=[a,b]": "chat=true: several adapters answer together; give adapter_weights, or one adapter",
    "checkpoint=bare": "chat=true: the model has no chat template",
    "chat=false system=x": "system is what a chat begins with: set chat=true",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_conversation_is_one_line(mistake: str, folder, bare, chat):
    result = chat("hi\n", *mistake.split())
    assert result.status == 2
    assert result.err.startswith(f"error: {MISTAKES[mistake]}")
    assert result.err.count("\n") == 1


def test_a_model_that_ends_at_once_leaves_a_hint_how_it_is_asked(folder, bare, command, chat):
    at_once = ("generation=greedy", "generation.max_new_tokens=4", "generation.logit_bias={256:1000}")
    result = command("generate", "checkpoint=model", "prompt=hi", *at_once)
    assert (result.status, result.out) == (0, "hi\n")
    assert result.err == (
        "hint: the model ended its text at once; it has a chat template, so ask it as in a conversation: chat=true\n"
    )
    result = command("generate", "checkpoint=bare", "prompt=hi", *at_once)
    assert result.err == (
        "hint: the model ended its text at once; write the prompt as its training data has them, "
        "or set generation.min_new_tokens=1\n"
    )
    assert "the model ended its answer before it began" in chat("hi\n", *at_once).err


def test_a_bare_prompt_to_a_chat_model_is_hinted_at_in_a_terminal_alone(folder, command, monkeypatch):
    arguments = ("generate", "checkpoint=model", *GREEDY, "generation.logit_bias={256:-100,258:-100}")
    assert command(*arguments, "prompt=hi").err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert command(*arguments, "prompt=hi").err.startswith("hint: the model has a chat template")
    assert command(*arguments, "prompt=<|im_start|>user").err == ""


def test_a_conversation_needs_a_template(byte_tokenizer):
    with pytest.raises(ConfigError, match="no chat template"):
        Conversation(byte_tokenizer, context=10)


def test_functions_are_called_and_the_model_goes_on_with_what_they_give(folder, chat, tmp_path, monkeypatch):
    from types import SimpleNamespace

    (folder / "chat_template.jinja").write_text(
        "{% if tools %}{{ tools[0].function.name }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (tmp_path / "my_tools.py").write_text(
        'def double(n: int) -> int:\n    """Twice.\n\n    Args:\n        n: A number.\n    """\n    return 2 * n\n'
    )
    call = '<tool_call>{"name": "double", "arguments": {"n": %s}}</tool_call>'
    said, prompts = iter(["So: " + call % 4, call.replace("double", "x") % 1, "It is 8."]), []

    def scripted(model, tokenizer, rows, options, *, on_text, **rest):
        text = next(said)
        prompts.append(tokenizer.decode(rows[0]))
        on_text(0, text)
        return [[SimpleNamespace(text=text, tokens=[65, 256])]]

    monkeypatch.setattr(terminal, "complete", scripted)
    result = chat("4?\n/save talk.jsonl\n", "tools=my_tools.py:double", "generation.max_new_tokens=8")
    assert (result.status, result.out) == (0, "It is 8.\n"), result.err
    assert 'double({"n": 4}) = 8' in result.err
    assert "error: there is no tool x, but double" in result.err
    assert prompts[0] == "double[user]4?[assistant]"
    written = '{"name": "double", "arguments": {"n": 4}}'
    assert prompts[1] == f"double[user]4?[assistant]So:<tool_call>{written}</tool_call>[tool]8[assistant]"
    row = json.loads((tmp_path / "talk.jsonl").read_text())
    assert [m["role"] for m in row["messages"]] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert row["tools"][0]["function"]["name"] == "double"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("tools=double",), "tools=double: name a function as module:function or file.py:function"),
        (("tools=no_such:double",), "tools=no_such:double: cannot be imported"),
        (("tools=json:dumps",), "tools: dumps is no tool"),
    ],
)
def test_what_is_no_tool_is_one_line(chat, arguments, error):
    result = chat("hi\n", *arguments)
    assert result.status != 0
    assert error in result.err


def test_tools_without_a_chat_are_refused(folder, command):
    result = command("generate", "checkpoint=model", "prompt=hi", "tools=json:dumps")
    assert result.err == "error: tools are what a chat may call: set chat=true\n"
