"""A masked language model of RoBERTa or BERT goes through a run: class, positions, pooler and tokenizer come out as they were."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers import RobertaModel as RobertaWithPooler

from tests.conftest import TINY

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
RUN = [word for word in TINY if not word.startswith(("model.", "tokenizer"))]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXT = [f"{a} {b} word" for a in "abcdefgh" for b in "ijklmnop"]


def write_tokenizer(folder: Path, special: list[str], **named: str) -> int:
    """A tokenizer of words whose special tokens come first; the number of its tokens."""
    words = sorted({word for line in TEXT for word in line.split()})
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*special, *words])}, named["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    begin, end = named["cls_token"], named["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", pair=f"{begin} $A {end} $B {end}",
        special_tokens=[(token, special.index(token)) for token in (begin, end)],
    )  # fmt: skip
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    wrapped.save_pretrained(folder)
    return len(wrapped)


def write_roberta(folder: Path) -> None:
    """A masked language model whose file also holds a pooler."""
    names = {
        "cls_token": "<s>",
        "pad_token": "<pad>",
        "sep_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    n = write_tokenizer(folder, ROBERTA, **names)
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1, "max_position_embeddings": 66}
    config = RobertaConfig(vocab_size=n, **SIZES, **ids)
    model = RobertaForMaskedLM(config)
    model.roberta = RobertaWithPooler(config)  # as in folders that were made of a whole pretrained model
    model.tie_weights()
    model.save_pretrained(folder)


def write_bert(folder: Path) -> None:
    names = {
        "cls_token": "[CLS]",
        "pad_token": "[PAD]",
        "sep_token": "[SEP]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
    }
    n = write_tokenizer(folder, BERT, **names)
    BertForPreTraining(BertConfig(vocab_size=n, max_position_embeddings=64, **SIZES)).save_pretrained(folder)


@torch.no_grad()
@pytest.mark.parametrize(("write", "kind"), [(write_roberta, "Roberta"), (write_bert, "Bert")])
def test_a_run_at_a_rate_of_nothing_writes_what_it_read(write, kind: str, command, tmp_path: Path) -> None:
    torch.manual_seed(0)
    write(tmp_path / "old")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT))
    options = ("init_from=old", "data.path=text.jsonl", "data.seq_len=32", "optimizer=sgd", "optimizer.lr=1e-20")
    result = command("train", "objective=mlm", *options, *RUN, "hydra.run.dir=run")
    assert result.status == 0, result.err
    old, new = tmp_path / "old", tmp_path / "run" / "model"
    ids = torch.arange(5, 19)[None]
    theirs, again = (AutoModelForMaskedLM.from_pretrained(folder).eval() for folder in (old, new))
    assert type(again).__name__ == type(theirs).__name__ == f"{kind}ForMaskedLM"
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=0, atol=1e-6)
    poolers = [AutoModel.from_pretrained(folder).eval()(ids).pooler_output for folder in (old, new)]
    torch.testing.assert_close(*poolers, rtol=0, atol=1e-6)
    assert (
        AutoTokenizer.from_pretrained(new)(TEXT[:3])["input_ids"]
        == AutoTokenizer.from_pretrained(old)(TEXT[:3])["input_ids"]
    )
    assert again.config.max_position_embeddings == theirs.config.max_position_embeddings
    assert again.config.pad_token_id == theirs.config.pad_token_id
