"""Tokenizers are read as AutoTokenizer reads them, and written so that it reads them alike, whatever they are."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from genai_pl.data import byte_tokenizer, fingerprint, pretrained_tokenizer, token_bytes, train_bpe
from genai_pl.data.tokenizer import reloads_unchanged, save_tokenizer, tokenizer_files, tokenizer_from_files
from genai_pl.errors import CheckpointError
from genai_pl.loading import load
from tests.conftest import TINY
from tests.data.tokenizer_kinds import (
    CORPUS,
    KINDS,
    STATES,
    TEXTS,
    around,
    byte_level,
    sentencepiece,
    unigram,
    word_ends,
    wordpiece,
    write_folder,
)

CLASSES = {  # of tokenizer_config.json, with the types of models that they lie beside
    "LlamaTokenizerFast": "llama", "Qwen2Tokenizer": "qwen2", "GPT2TokenizerFast": "gpt2", "BertTokenizer": "bert",
    "GemmaTokenizerFast": "gemma3_text", "RobertaTokenizerFast": "roberta", "XLNetTokenizerFast": "xlnet",
    "TokenizersBackend": "mistral", "PreTrainedTokenizerFast": "qwen3",
}  # fmt: skip
AROUND = {"nothing": (None, None), "bos": ("<s>", None), "eos": (None, "</s>"), "both": ("[CLS]", "[SEP]")}


def all_ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=special)["input_ids"] for text in TEXTS for special in (True, False)]


def check_round_trip(folder: Path, out: Path) -> None:
    """What we read is what AutoTokenizer reads; so is what we write, into a folder or a checkpoint."""
    try:
        theirs = AutoTokenizer.from_pretrained(folder)
    except Exception:
        with pytest.raises(CheckpointError, match="no tokenizer could be read from it"):
            pretrained_tokenizer(str(folder))
        return
    ours = pretrained_tokenizer(str(folder))
    assert all_ids(ours) == all_ids(theirs)
    again = tokenizer_from_files(tokenizer_files(ours))
    save_tokenizer(ours, out)
    if (folder / "config.json").is_file():
        shutil.copy(folder / "config.json", out)
    read = AutoTokenizer.from_pretrained(out)
    for other in (again, read):
        assert all_ids(other) == all_ids(theirs)
        assert fingerprint(other) == fingerprint(ours)
        assert other.special_tokens_map == theirs.special_tokens_map
        assert other.chat_template == theirs.chat_template
        assert other.added_tokens_decoder == theirs.added_tokens_decoder
        assert (other.padding_side, other.model_input_names) == (theirs.padding_side, theirs.model_input_names)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_is_read_and_written_as_its_own_tools_do(kind: str, state: str, tmp_path: Path) -> None:
    for name, (first, last) in AROUND.items():
        tokenizer = KINDS[kind]()
        around(tokenizer, first, last)
        check_round_trip(write_folder(tmp_path / name, tokenizer, state=state), tmp_path / f"{name} again")


@pytest.mark.parametrize("tokenizer_class", CLASSES)
def test_a_class_that_builds_its_own_is_written_as_what_it_built(tokenizer_class: str, tmp_path: Path) -> None:
    for kind, make in KINDS.items():
        for model_type in (None, CLASSES[tokenizer_class]):
            folder = tmp_path / f"{kind} {model_type}"
            write_folder(folder, make(), tokenizer_class=tokenizer_class, model_type=model_type)
            check_round_trip(folder, tmp_path / f"{kind} {model_type} again")


def test_what_is_written_names_the_class_that_every_transformers_has(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "there", byte_level(prefix=True), state="added", tokenizer_class="GPT2Tokenizer")
    save_tokenizer(pretrained_tokenizer(str(folder)), tmp_path / "out")
    values = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert values["model_input_names"] == ["input_ids", "attention_mask"]
    before = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["pre_tokenizer"]
    assert values["add_prefix_space"] == before["add_prefix_space"]  # what transformers 4 reads puts it there
    assert "extra_special_tokens" not in values  # a list of that name is an error in transformers 4
    assert values["additional_special_tokens"] == ["<extra>"]


@pytest.mark.parametrize("state", ["cut", "padded"])
@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "BertTokenizer", "GPT2Tokenizer"])
def test_a_limit_in_tokenizer_json_cuts_and_pads_nothing(state: str, tokenizer_class: str, tmp_path: Path) -> None:
    plain = pretrained_tokenizer(str(write_folder(tmp_path / "plain", wordpiece(), tokenizer_class=tokenizer_class)))
    folder = write_folder(tmp_path / "limited", wordpiece(), state=state, tokenizer_class=tokenizer_class)
    limited = pretrained_tokenizer(str(folder))
    assert all_ids(limited) == all_ids(plain)
    backend, expected = limited.backend_tokenizer, plain.backend_tokenizer
    for text in TEXTS:
        assert backend.encode(text).ids == backend.encode_batch_fast([text])[0].ids == expected.encode(text).ids
    assert fingerprint(limited) == fingerprint(plain)


@pytest.mark.parametrize("state", ["cut", "padded"])
def test_no_limit_is_ever_written(state: str, tmp_path: Path) -> None:
    tokenizer = pretrained_tokenizer(str(write_folder(tmp_path / "there", byte_level(), state=state)))
    tokenizer(["one", "more text"], truncation=True, max_length=2, padding="max_length")  # a state that stays
    for name, text in tokenizer_files(tokenizer).items():
        if name == "tokenizer.json":
            assert json.loads(text)["truncation"] is json.loads(text)["padding"] is None
        if name == "tokenizer_config.json":
            assert not {"max_length", "stride", "truncation_strategy", "pad_to_multiple_of"} & set(json.loads(text))


RUNS = {
    "contrastive": ({"anchor": "a b", "positive": "a c"}, ["objective=contrastive", "model=bert", "model.n_head=2"]),
    "seq2seq": ({"source": "a b c", "target": "c"}, ["objective=seq2seq", "model=t5_nano", "model.n_head=2"]),
}


@pytest.mark.parametrize("kind", RUNS)
def test_runs_that_cut_their_texts_write_no_limit(kind: str, command, tmp_path: Path) -> None:
    row, options = RUNS[kind]
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 40)
    result = command("train", *options, *TINY, "data.path=rows.jsonl", "trainer.max_steps=1", "hydra.run.dir=run")
    assert result.status == 0, result.err
    state = json.loads((tmp_path / "run" / "model" / "tokenizer.json").read_text())
    assert state["truncation"] is state["padding"] is None


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_a_model_with_biases_before_attention_alone_keeps_its_tokenizer(
    tokenizer: str, command, tmp_path: Path
) -> None:
    """transformers reads Qwen 2 with a pre-tokenizer of its own; the same function as a Llama has no such fate."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    options = [
        "model=llama",
        "model.qkv_bias=true",
        "model.n_head=4",
        "model.n_kv_head=2",
        "model.intermediate_size=64",
    ]
    tiny = [option for option in TINY if not option.startswith("tokenizer")]
    result = command("train", *options, *tiny, f"tokenizer={tokenizer}", "hydra.run.dir=run", "optimizer.lr=0.1")
    assert result.status == 0, result.err
    trained, exported = load("run/checkpoints/last.ckpt"), load("run/model")
    theirs = AutoTokenizer.from_pretrained("run/model")
    assert all_ids(trained.tokenizer) == all_ids(exported.tokenizer) == all_ids(theirs)
    assert trained.model.config.o_bias is False
    input_ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained("run/model")(input_ids).logits
        torch.testing.assert_close(trained.model(input_ids), logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(exported.model(input_ids), logits, rtol=1e-4, atol=1e-4)
    assert command("export", "checkpoint=run/checkpoints/last.ckpt", "format=hf", "out=again").status == 0
    assert all_ids(AutoTokenizer.from_pretrained("again")) == all_ids(theirs)


TYPES = ["gpt2", "llama", "mistral", "qwen3", "gemma3_text", "bert", "roberta", "albert", "t5", "xlnet", "genai_pl"]


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: train_bpe(CORPUS, 300)], ids=["byte", "bpe"])
def test_our_tokenizers_are_read_as_they_are_beside_every_family_but_one(make, tmp_path: Path) -> None:
    tokenizer = make()
    for kind in [*TYPES, "qwen2"]:
        folder = tmp_path / kind
        save_tokenizer(tokenizer, folder)
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        same = all_ids(AutoTokenizer.from_pretrained(folder)) == all_ids(tokenizer)
        assert reloads_unchanged(tokenizer, kind) == same == (kind != "qwen2")


def test_named_chat_templates_survive_a_checkpoint_and_an_export(command, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "there", byte_level(), state="templates")
    theirs = AutoTokenizer.from_pretrained(folder)
    assert sorted(theirs.chat_template) == ["default", "tool_use"]
    tiny = [option for option in TINY if not option.startswith("tokenizer")]
    given = ["tokenizer=pretrained", "tokenizer.name=there"]
    result = command("train", *tiny, *given, "model.n_head=2", "hydra.run.dir=run")
    assert result.status == 0, result.err
    assert command("export", "checkpoint=run/checkpoints/last.ckpt", "format=hf", "out=out").status == 0
    messages = [{"role": "user", "content": "hello"}]
    read = [load("run/checkpoints/last.ckpt").tokenizer, *map(AutoTokenizer.from_pretrained, ("run/model", "out"))]
    for tokenizer in read:
        assert tokenizer.chat_template == theirs.chat_template
        said = tokenizer.apply_chat_template(messages, tokenize=False, chat_template="tool_use")
        assert said == "hello?"


def test_tokenizer_json_is_read_whatever_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "there", byte_level(), model_type="mistral")
    (folder / "tekken.json").write_text("{}")
    expected, asked = all_ids(AutoTokenizer.from_pretrained(folder)), []

    class Common:
        """What mistral-common's tokenizer has in common with others: nothing that is asked for."""

    def read(name: str, **options: object) -> object:
        asked.append(options)
        return Common()

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", read)
    assert all_ids(pretrained_tokenizer(str(folder))) == expected
    assert asked == [{"mistral_format": False, "trust_remote_code": False}]


def test_a_file_of_a_checkpoint_cannot_lie_elsewhere(tmp_path: Path) -> None:
    files = tokenizer_files(byte_tokenizer())
    for name in ("../outside.json", "/tmp/outside.json", "a/../../outside.json"):
        with pytest.raises(CheckpointError, match="which lies elsewhere"):
            tokenizer_from_files({**files, name: "{}"})


@pytest.mark.parametrize("broken", ["", "{}", "[1]", '{"model": {"type": "None"}}', '{"version": "1.0", "model": 3}'])
def test_a_broken_tokenizer_json_is_one_line(broken: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "there", byte_level())
    (folder / "tokenizer.json").write_text(broken)
    with pytest.raises(CheckpointError, match="no tokenizer could be read from it") as caught:
        pretrained_tokenizer(str(folder))
    assert "\n" not in str(caught.value)


COUNTED = {  # what the tokens of a text stand for beside the text's own bytes
    "byte level": (byte_level, lambda text: len(text.encode())),
    "sentencepiece": (sentencepiece, lambda text: len(f" {text}".encode())),
    "unigram": (unigram, lambda text: len(f" {text}".encode())),
    "wordpiece": (lambda: wordpiece(lowercase=False), lambda text: len("".join(text.split()).encode())),
    "word ends": (word_ends, lambda text: len(f"{text} ".encode())),
}


@pytest.mark.parametrize("kind", COUNTED)
def test_bytes_of_tokens_add_up_to_those_of_the_text(kind: str) -> None:
    make, expected = COUNTED[kind]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), unk_token="<unk>")
    tokenizer.add_tokens([AddedToken("<größe>"), AddedToken("##日本"), AddedToken("▁é")])
    sizes = token_bytes(tokenizer, len(tokenizer) + 3)
    for text in ("Hello world", "Größe, naïve café — 日本語", "a <größe> b", "##日本", "jumps ##日本 x"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.unk_token_id not in ids and "<unk>" not in tokenizer.convert_ids_to_tokens(ids):
            added = sum(text.count(token) for token in ("<größe>", "##日本"))
            # a space is put before or after each part that an added token leaves, or before none
            assert abs(sum(sizes[i] for i in ids) - expected(text)) <= added * (kind not in ("byte level", "wordpiece"))
    assert sizes[-3:] == [0, 0, 0]


@pytest.mark.parametrize("make", [byte_level, sentencepiece, wordpiece, unigram])
def test_an_added_token_has_the_bytes_it_is_written_with(make) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make())
    tokens = ["<größe>", "日本", "▁é", "##x", "<0x41>!", "Ġa"]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    tokenizer.add_tokens([AddedToken("<special-ö>", special=True)], special_tokens=True)
    sizes = token_bytes(tokenizer, len(tokenizer))
    assert [sizes[tokenizer.convert_tokens_to_ids(token)] for token in tokens] == [len(t.encode()) for t in tokens]
    assert sizes[tokenizer.convert_tokens_to_ids("<special-ö>")] == 0


def test_marks_of_one_kind_are_text_in_another() -> None:
    """In a vocabulary of pieces, ## is two number signs; in one of words, ▁ is a character, and <0x41> six."""
    pieces = sentencepiece()
    state = json.loads(pieces.to_str())
    state["model"]["vocab"]["##"] = len(state["model"]["vocab"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    sizes, vocab = token_bytes(tokenizer, len(tokenizer)), tokenizer.get_vocab()
    assert (sizes[vocab["##"]], sizes[vocab["<0x41>"]], sizes[vocab["▁"]]) == (2, 1, 1)
    state = json.loads(wordpiece().to_str())
    state["model"]["vocab"] |= {token: len(state["model"]["vocab"]) + n for n, token in enumerate(("<0x41>", "▁é"))}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    sizes, vocab = token_bytes(tokenizer, len(tokenizer)), tokenizer.get_vocab()
    assert (sizes[vocab["<0x41>"]], sizes[vocab["▁é"]]) == (6, 5)


def test_scores_that_are_read_a_digit_off_are_the_same_tokenizer() -> None:
    scores = [("<unk>", 0.0), *((chr(97 + n % 26) * (n // 26 + 1), -20 / (n + 1.7)) for n in range(2000))]
    made = Tokenizer(models.Unigram(scores, unk_id=0))
    again = Tokenizer.from_str(made.to_str())
    assert made.to_str() != again.to_str()
    first, second = (PreTrainedTokenizerFast(tokenizer_object=each) for each in (made, again))
    assert fingerprint(first) == fingerprint(second) == fingerprint(tokenizer_from_files(tokenizer_files(first)))
    assert reloads_unchanged(first, "llama")


def test_what_changes_ids_changes_the_fingerprint() -> None:
    def lower(tokenizer: PreTrainedTokenizerFast) -> None:
        from tokenizers import normalizers

        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()

    def split(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.split_special_tokens = True

    def end(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.eos_token = "<|pad|>"

    def template(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.chat_template = "{{ messages }}"

    changes = [
        lower,
        split,
        end,
        template,
        lambda t: t.add_tokens(["ab"]),
        lambda t: around(t.backend_tokenizer, None, None),
    ]
    found = {fingerprint(byte_tokenizer())}
    for n, change in enumerate(changes, start=2):
        tokenizer = byte_tokenizer()
        change(tokenizer)
        found.add(fingerprint(tokenizer))
        if change is not changes[-1]:  # a post-processor that adds nothing changes nothing
            assert len(found) == n
    tokenizer = byte_tokenizer()
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=1)
    assert fingerprint(tokenizer) == fingerprint(byte_tokenizer())
