"""Folders of sentence-transformers: vectors by formulas of torch, by sentence-transformers itself where it is there."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from genai_pl.data.text_tokens import append_end_token, appends_end_token, encode_texts
from genai_pl.data.tokenizer import byte_tokenizer, pretrained_tokenizer, train_bpe
from genai_pl.errors import CheckpointError
from genai_pl.evaluation.embeddings import embed, encode_sentences, find_sentence_head
from genai_pl.exporting import export_model
from genai_pl.loading import load
from genai_pl.models import ModelConfig, build_model
from tests.conftest import TINY

TEXTS = ["A short text", "Something LONGER than that, with a comma", "x"]
C = 16
FORMULAS = {  # of the hidden states (T, C) of one text
    "cls": lambda h: h[0],
    "max": lambda h: h.amax(0),
    "mean": lambda h: h.mean(0),
    "mean_sqrt_len_tokens": lambda h: h.sum(0) / len(h) ** 0.5,
    "weightedmean": lambda h: (h * torch.arange(1, len(h) + 1)[:, None]).sum(0) / (len(h) * (len(h) + 1) / 2),
    "lasttoken": lambda h: h[-1],
}
PARTS = {
    "Transformer": "sentence_transformers.base.modules.transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling",
    "Normalize": "sentence_transformers.base.modules.normalize",
    "Dense": "sentence_transformers.base.modules.dense",
    "LayerNorm": "sentence_transformers.sentence_transformer.modules.layer_norm",
    "Dropout": "sentence_transformers.sentence_transformer.modules.dropout",
    "LSTM": "sentence_transformers.sentence_transformer.modules.lstm",
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A function that writes a small BERT with the modules given, as sentence-transformers 6 does."""

    def folder(
        *modules: tuple[str, dict], tokens: dict | None = None, prompts: dict | None = None, weights: dict | None = None
    ) -> Path:
        path, tokenizer = tmp_path / "sentences", byte_tokenizer()
        append_end_token(tokenizer)
        sizes = {
            "n_layer": 1,
            "n_head": 2,
            "n_embd": C,
            "vocab_size": len(tokenizer),
            "max_seq_len": 64,
            "init_std": 0.3,
        }
        bert = {"norm_order": "post", "embed_norm": True, "activation": "gelu", "n_token_types": 2, "norm_eps": 1e-12}
        torch.manual_seed(0)
        model = build_model(ModelConfig(shape="encoder", head="none", **sizes, **bert))
        export_model(model, tokenizer, path, card={})
        listed = [{"idx": 0, "name": "0", "path": "", "type": f"{PARTS['Transformer']}.Transformer"}]
        for n, (kind, settings) in enumerate(modules, start=1):
            listed.append({"idx": n, "name": str(n), "path": f"{n}_{kind}", "type": f"{PARTS[kind]}.{kind}"})
            (path / f"{n}_{kind}").mkdir()
            (path / f"{n}_{kind}" / "config.json").write_text(json.dumps(settings))
            if kind in (weights or {}):
                save_file(weights[kind], path / f"{n}_{kind}" / "model.safetensors")
        (path / "modules.json").write_text(json.dumps(listed))
        (path / "sentence_bert_config.json").write_text(json.dumps(tokens or {}))
        (path / "config_sentence_transformers.json").write_text(json.dumps(prompts or {}))
        return path

    return folder


def ours(path: Path, texts: list[str] = TEXTS) -> torch.Tensor:
    loaded = load(str(path))
    head = find_sentence_head(None, loaded.path, loaded.tokenizer, loaded.model.config)
    return embed(loaded.model, encode_sentences(loaded.tokenizer, texts, head), head)


def states(path: Path, text: str, *, max_length: int = 64) -> torch.Tensor:
    """Hidden states (T, C) that transformers gives for one text of bytes with its end token."""
    from transformers import BertModel

    model = BertModel.from_pretrained(path, add_pooling_layer=False)
    with torch.no_grad():
        return model(torch.tensor([[*text.encode()[: max_length - 1], 256]])).last_hidden_state[0]


def pooling(mode: str | list[str]) -> tuple[str, dict]:
    return "Pooling", {"embedding_dimension": C, "pooling_mode": mode, "include_prompt": True}


def check_peer(path: Path, found: torch.Tensor, texts: list[str] = TEXTS) -> None:
    """The same vectors by sentence-transformers, where it is installed."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return
    theirs = SentenceTransformer(str(path), device="cpu").encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(found, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", FORMULAS)
def test_every_pooling_is_that_of_its_formula(mode: str, write: Write) -> None:
    path = write(pooling(mode))
    found = ours(path)
    torch.testing.assert_close(
        found, torch.stack([FORMULAS[mode](states(path, t)) for t in TEXTS]), atol=1e-5, rtol=1e-5
    )
    check_peer(path, found)


@pytest.mark.parametrize("flag", ["pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens", None])
def test_the_flags_of_older_folders_say_the_same_and_no_flag_is_the_mean(flag: str | None, write: Write) -> None:
    flags = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False} | ({flag: True} if flag else {})
    path = write(("Pooling", {"word_embedding_dimension": C, **flags}))
    mode = flag.removeprefix("pooling_mode_") if flag else "mean"
    formula = FORMULAS["weightedmean" if mode.startswith("weighted") else mode]
    torch.testing.assert_close(ours(path), torch.stack([formula(states(path, t)) for t in TEXTS]), atol=1e-5, rtol=1e-5)


def test_several_poolings_dense_layers_and_a_norm_follow_each_other_without_a_unit_length(write: Write) -> None:
    torch.manual_seed(1)
    dense = {
        "linear.weight": torch.randn(8, 2 * C),
        "linear.bias": torch.randn(8),
        "residual.weight": torch.randn(8, 2 * C),
    }
    norm = {"norm.weight": torch.randn(8), "norm.bias": torch.randn(8)}
    settings = {"in_features": 2 * C, "out_features": 8, "bias": True, "use_residual": True}
    gelu = {**settings, "activation_function": "torch.nn.modules.activation.GELU"}
    modules = (
        pooling(["cls", "mean"]),
        ("Dense", gelu),
        ("LayerNorm", {"dimension": 8}),
        ("Dropout", {"dropout": 0.5}),
    )
    path = write(*modules, weights={"Dense": dense, "LayerNorm": norm}, prompts={"truncate_dim": 6})

    def formula(h: torch.Tensor) -> torch.Tensor:
        x = torch.cat([h[0], h.mean(0)])
        y = F.gelu(F.linear(x, dense["linear.weight"], dense["linear.bias"])) + F.linear(x, dense["residual.weight"])
        return F.layer_norm(y, (8,), norm["norm.weight"], norm["norm.bias"])[:6]

    found = ours(path)
    torch.testing.assert_close(found, torch.stack([formula(states(path, t)) for t in TEXTS]), atol=1e-5, rtol=1e-5)
    check_peer(path, found)


def test_a_default_prompt_lower_case_and_a_length_are_kept_to_and_the_end_stays(write: Write) -> None:
    prompts = {"prompts": {"query": "Find: ", "document": ""}, "default_prompt_name": "query"}
    tokens = {"max_seq_length": 12, "do_lower_case": True}
    path = write(pooling("mean"), ("Normalize", {}), tokens=tokens, prompts=prompts)
    rows = [F.normalize(states(path, f"find: {t.lower()}", max_length=12).mean(0), dim=0) for t in TEXTS]
    found = ours(path)
    torch.testing.assert_close(found, torch.stack(rows), atol=1e-5, rtol=1e-5)
    check_peer(path, found)


@pytest.mark.parametrize(
    ("modules", "options", "message"),
    [
        ((("LSTM", {}), pooling("mean")), {}, "module 1_LSTM (sentence_transformers.sentence_transformer.modules.lstm.LSTM)"),
        ((pooling("mean"), ("LSTM", {})), {}, "module 2_LSTM"),
        ((pooling("median"),), {}, "1_Pooling/config.json: pooling_mode=median"),
        ((), {}, "needs the modules Transformer and Pooling"),
        ((pooling("mean"), ("Dense", {"in_features": 9, "out_features": 4})), {}, "2_Dense: it takes 9 numbers, and is given 16"),
        ((pooling("mean"), ("Dense", {"in_features": C, "out_features": 4})), {}, "2_Dense: its weights cannot be read"),
        (
            (pooling("mean"), ("Dense", {"in_features": C, "out_features": 4, "activation_function": "os.system"})),
            {},
            "2_Dense/config.json: this Dense module is not supported",
        ),
        ((pooling("mean"),), {"tokens": {"transformer_task": "fill-mask"}}, "'transformer_task': 'fill-mask'"),
        ((pooling("mean"),), {"tokens": {"processing_kwargs": {"text": {}}}}, "processing_kwargs"),
        ((pooling("mean"),), {"prompts": {"default_prompt_name": "q", "prompts": {}}}, "default_prompt_name=q"),
        (
            (("Pooling", {"pooling_mode": "mean", "include_prompt": False}),),
            {"prompts": {"default_prompt_name": "q", "prompts": {"q": "Q: "}}},
            "include_prompt=false",
        ),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_one_line_that_names_the_module(
    modules: tuple, options: dict, message: str, write: Write
) -> None:
    path = write(*modules, **options)
    with pytest.raises(CheckpointError) as error:
        ours(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def tokenizers() -> dict[str, object]:
    from tokenizers import processors

    bos = byte_tokenizer()
    bos.backend_tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|pad|> $A", pair="<|pad|> $A $B:1", special_tokens=[("<|pad|>", 257)]),
    ])  # fmt: skip
    gpt2 = train_bpe(["a few words to learn from"], 260)
    gpt2.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return {"byte": byte_tokenizer(), "bpe": train_bpe(["a few words to learn from"], 260), "bos": bos, "gpt2": gpt2}


@pytest.mark.parametrize("kind", ["byte", "bpe", "bos", "gpt2"])
def test_a_closed_tokenizer_gives_the_tokens_of_training_to_whoever_reads_its_file(kind: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = tokenizers()[kind]
    texts = [*TEXTS, "", "ends in <|endoftext|>"]
    expected = encode_texts(tokenizer, texts)
    assert all(row[-1] == tokenizer.eos_token_id for row in expected)
    assert not appends_end_token(tokenizer)
    append_end_token(tokenizer)
    append_end_token(tokenizer)  # once is enough
    assert appends_end_token(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [file.encode(text).ids for text in texts] == expected
    again = pretrained_tokenizer(str(tmp_path))
    assert encode_texts(again, texts) == again(texts)["input_ids"] == expected
    assert encode_texts(again, texts, max_length=6) == [
        [*row[:5], row[-1]] if len(row) > 6 else row for row in expected
    ]


@pytest.mark.parametrize("kind", ["byte", "bpe tokenizer.vocab_size=270"])
def test_a_contrastive_run_exports_what_sentence_transformers_reads_as_we_do(
    kind: str, command, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, BertModel

    rows = [{"anchor": f"What is {n}?", "positive": f"It is {n + 1}"} for n in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = (*TINY, "model=bert_nano", "model.n_head=4", *f"tokenizer={kind}".split())
    result = command("train", "objective=contrastive", *given, "data.path=pairs.jsonl", "hydra.run.dir=run")
    assert result.status == 0, result.err
    found = ours(tmp_path / "run" / "model")
    torch.testing.assert_close(ours(tmp_path / "run" / "checkpoints" / "last.ckpt"), found, atol=0, rtol=0)
    folder = tmp_path / "run" / "model"
    model, tokenizer = BertModel.from_pretrained(folder, add_pooling_layer=False), AutoTokenizer.from_pretrained(folder)
    for text, vector in zip(TEXTS, found, strict=True):
        ids = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = model(ids).last_hidden_state[0]
        torch.testing.assert_close(vector, F.normalize(hidden.mean(0), dim=0), atol=1e-6, rtol=0)
    check_peer(folder, found)


def test_fine_tuning_and_exporting_keep_the_modules_of_the_folder(write: Write, command, tmp_path: Path) -> None:
    dense = {"linear.weight": torch.randn(8, C), "linear.bias": torch.randn(8)}
    settings = {"in_features": C, "out_features": 8, "activation_function": "torch.nn.modules.activation.Tanh"}
    prompts = {"prompts": {"query": "Find: "}, "default_prompt_name": "query", "similarity_fn_name": "dot"}
    write(pooling("cls"), ("Dense", settings), weights={"Dense": dense}, prompts=prompts, tokens={"max_seq_length": 20})
    rows = [{"anchor": f"What is {n}?", "positive": f"It is {n + 1}"} for n in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [option for option in TINY if not option.startswith(("model", "tokenizer"))]
    result = command(
        "train", "objective=contrastive", "init_from=sentences", *given, "data.path=pairs.jsonl", "hydra.run.dir=run"
    )
    assert result.status == 0, result.err
    assert command("export", "checkpoint=run", "format=hf", "out=again").status == 0
    found = ours(tmp_path / "run" / "model")
    assert found.shape == (3, 8)
    torch.testing.assert_close(ours(tmp_path / "again"), found, atol=0, rtol=0)
    torch.testing.assert_close(ours(tmp_path / "run" / "checkpoints" / "last.ckpt"), found, atol=0, rtol=0)
    assert (found - ours(tmp_path / "sentences")).abs().max() > 1e-4  # it has learned
    kept = json.loads((tmp_path / "again" / "config_sentence_transformers.json").read_text())
    assert kept == prompts
    check_peer(tmp_path / "again", found)
