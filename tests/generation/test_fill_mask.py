import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from genai_pl.config.model import ModelConfig
from genai_pl.errors import ConfigError
from genai_pl.generation.fill_mask import fill
from genai_pl.models import Encoder, load_pretrained

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "far"],
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> tuple[transformers.PreTrainedModel, Encoder]:
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=40)
    config.vocab_size, config.max_position_embeddings, config.initializer_range = len(WORDS), 24, 0.4
    theirs = transformers.BertForMaskedLM(config).eval()
    folder = tmp_path_factory.mktemp("bert")
    theirs.save_pretrained(folder)
    return theirs, load_pretrained(folder)


def test_candidates_for_each_mask_are_those_of_transformers(bert, tokenizer):
    theirs, ours = bert
    text = "the [MASK] sat on a [MASK]"
    by_mask = fill(ours, tokenizer, text, top_k=4)
    pipeline = transformers.pipeline("fill-mask", model=theirs, tokenizer=tokenizer, top_k=4)
    expected = pipeline(text)
    assert [[c.text for c in candidates] for candidates in by_mask] == [
        [row["token_str"] for row in rows] for rows in expected
    ]
    scores = [row["score"] for rows in expected for row in rows]
    assert [c.probability for candidates in by_mask for c in candidates] == pytest.approx(scores, rel=1e-4)


def test_an_xlnet_predicts_masked_places_from_all_others(tokenizer):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "max_seq_len": 24, "init_std": 0.4, "vocab_size": len(WORDS)}
    model = Encoder(ModelConfig(shape="encoder", position="xl", norm_order="post", **sizes)).eval()
    [candidates] = fill(model, tokenizer, "the [MASK] ran far", top_k=len(WORDS))
    assert sum(c.probability for c in candidates) == pytest.approx(1, rel=1e-4)
    with torch.no_grad():  # what stands in the masked place itself makes no difference
        model.embed.weight[tokenizer.mask_token_id] += 1.0
    [same] = fill(model, tokenizer, "the [MASK] ran far", top_k=len(WORDS))
    assert [c.probability for c in same] == pytest.approx([c.probability for c in candidates], rel=1e-3)


def test_more_candidates_than_tokens_are_all(bert, tokenizer):
    assert len(fill(bert[1], tokenizer, "[MASK]", top_k=1000)[0]) == len(WORDS)


def test_a_text_without_a_mask_is_an_error(bert, tokenizer):
    with pytest.raises(ConfigError, match=r"no \[MASK\] in it"):
        fill(bert[1], tokenizer, "the cat", top_k=3)


def test_a_text_that_is_too_long_is_an_error(bert, tokenizer):
    with pytest.raises(ConfigError, match="42 tokens are more than the 24"):
        fill(bert[1], tokenizer, "[MASK] " * 40, top_k=3)


def test_an_encoder_without_a_head_is_an_error(tokenizer):
    config = ModelConfig(shape="encoder", n_layer=1, n_head=2, n_embd=8, vocab_size=len(WORDS), head="none")
    with pytest.raises(ConfigError, match="no language-model head"):
        fill(Encoder(config), tokenizer, "[MASK]", top_k=3)


def test_the_command_prints_candidates_for_each_mask(bert, tokenizer, command, tmp_path):
    theirs, ours = bert
    theirs.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    result = command("generate", "checkpoint=bert", "prompt=the [MASK] sat on [MASK]", "top_k=2")
    assert (result.status, result.err) == (0, "")
    expected = fill(ours, tokenizer, "the [MASK] sat on [MASK]", top_k=2)
    rows = [f"{n:>4}  {c.probability:.4f}  {c.text}" for n, row in enumerate(expected, 1) for c in row]
    assert result.out.splitlines() == ["the [MASK] sat on [MASK]", *rows]
    mistake = command("generate", "checkpoint=bert", "prompt=the cat")
    assert mistake.status == 2
    assert mistake.err == "error: prompt: no [MASK] in it for this encoder to fill in; or set embed=true\n"


@pytest.mark.parametrize("alias", ["<mask>", "<|mask|>"])
def test_the_mask_of_another_tokenizer_stands_for_the_own_one(alias: str, bert, tokenizer):
    own = fill(bert[1], tokenizer, "the [MASK] ran far", top_k=3)
    assert fill(bert[1], tokenizer, f"the {alias} ran far", top_k=3) == own
