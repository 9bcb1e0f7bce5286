"""Mining of hard negatives, a task of feedback.py: pairs of texts in, triplets or rankings out."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor

from genai_pl.atomic_io import write_atomic
from genai_pl.config.enums import Shape
from genai_pl.data import sources
from genai_pl.data.columns import parse_text
from genai_pl.devices import choose_device
from genai_pl.errors import ConfigError, DataError
from genai_pl.evaluation.embeddings import embed, encode_sentences, find_sentence_head
from genai_pl.evaluation.negatives import Mined, MiningOptions, mine_negatives
from genai_pl.loading import Loaded, load
from genai_pl.training.report import shell_arguments

OBJECTIVES = {"triplet": "contrastive", "ranking": "rerank"}  # format, and what reads it
Pair = tuple[str, str]


def write_negatives(config: DictConfig) -> int:
    """Write the negatives of all pairs of `data.path` into `out`; the exit status."""
    options = mining_options(config)
    source, out = sources.find_source(config.data.path), Path(config.out)
    if out.exists():
        raise ConfigError(f"out={config.out}: exists already; name a new file")
    pairs = read_pairs(config, source)
    candidates = list(dict.fromkeys([*read_corpus(config), *(positive for _, positive in pairs)]))
    loaded = load(config.checkpoint)
    check_model(loaded, config)
    # anchors are embedded once, whatever the number of their pairs
    number = {text: n for n, text in enumerate(candidates)}
    positives: dict[str, list[int]] = {}
    for anchor, positive in pairs:
        positives.setdefault(anchor, []).append(number[positive])
    loaded.model.to(choose_device(config.device))
    vectors = embed_texts(loaded, [*positives, *candidates], config.negatives.pooling)
    mined = mine_negatives(
        *vectors.split([len(positives), len(candidates)]), [*positives.values()], options,
        same_text=[number.get(anchor) for anchor in positives], seed=config.seed,
    )  # fmt: skip
    found = {anchor: [candidates[n] for n in row if n >= 0]
             for anchor, row in zip(positives, mined.indices.tolist(), strict=True)}  # fmt: skip
    lines = list(rows(pairs, found, config.negatives.format))
    if not lines:
        far = "" if config.negatives.positive_max_rank is None else " or raise negatives.positive_max_rank"
        raise DataError(f"data.path={config.data.path}: no negative remains; lower negatives.relative_margin{far}")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(out, lambda part: part.write_text(text, encoding="utf-8"))
    report(config, mined, n_pairs=len(pairs), n_candidates=len(candidates), n_lines=len(lines))
    return 0


def mining_options(config: DictConfig) -> MiningOptions:
    """The options of `negatives`; ConfigError for those that cannot work together."""
    given = config.negatives
    if given.format not in OBJECTIVES:
        raise ConfigError(f"negatives.format={given.format} is not one of {', '.join(OBJECTIVES)}")
    if given.sampling not in ("top", "random"):
        raise ConfigError(f"negatives.sampling={given.sampling} is not one of top, random")
    at_least = {
        "n": 1,
        "range_min": 0,
        "range_max": 1,
        "absolute_margin": 0,
        "relative_margin": 0,
        "positive_max_rank": 1,
    }
    for name, least in at_least.items():
        if given[name] is not None and given[name] < least:
            raise ConfigError(f"negatives.{name}={given[name]} must be at least {least}")
    options = MiningOptions(**{name: given[name] for name in MiningOptions._fields})
    if options.range_max is not None and options.range_max - options.range_min < options.n:
        fix = f"raise it to {options.range_min + options.n}"
        raise ConfigError(f"negatives.range_max={options.range_max} leaves no {options.n} candidates; {fix}")
    return options


def check_model(loaded: Loaded, config: DictConfig) -> None:
    """ConfigError for a model that gives no vectors of texts."""
    model_config = loaded.model.config
    if model_config.shape is Shape.encoder_decoder or model_config.head.scores:
        raise ConfigError(f"checkpoint={config.checkpoint}: it embeds no texts; name an encoder or a decoder")


def read_pairs(config: DictConfig, source: sources.Source) -> list[Pair]:
    """Distinct pairs of anchor and positive, in the order of the rows."""
    columns = {f"data.{role}": config.data[role] for role in ("anchor", "positive")}
    sources.check_columns(source, sources.column_names(source), columns)
    names = [*columns.values()]
    records = islice(sources.read_records(source, {*names}), config.limit)
    found = (tuple(parse_text(row.get(name), place._replace(column=name)) for name in names) for place, row in records)
    pairs = list(dict.fromkeys(found))
    if not pairs:
        raise DataError(f"data.path={config.data.path}: no rows")
    return pairs


def read_corpus(config: DictConfig) -> Iterator[str]:
    """Texts of `negatives.corpus`, candidates beside the positives of the data."""
    if config.negatives.corpus is None:
        return
    source = sources.find_source(config.negatives.corpus, option="negatives.corpus")
    column = config.negatives.corpus_column
    sources.check_columns(source, sources.column_names(source), {"negatives.corpus_column": column})
    for place, row in sources.read_records(source, {column}):
        yield parse_text(row.get(column), place._replace(column=column))


def embed_texts(loaded: Loaded, texts: list[str], pooling: str | None) -> Tensor:
    """Vectors (N, D) of texts, as the model's folder says they are made."""
    model_config = loaded.model.config
    head = find_sentence_head(pooling, loaded.path, loaded.tokenizer, model_config)
    tokens = encode_sentences(loaded.tokenizer, texts, head, max_length=model_config.max_seq_len)
    return embed(loaded.model, tokens, head)


def rows(pairs: list[Pair], negatives: dict[str, list[str]], form: str) -> Iterator[dict[str, object]]:
    """Lines of the output: of a triplet one for each negative, of a ranking one for each pair that has negatives."""
    for anchor, positive in pairs:
        found = negatives[anchor]
        if form == "triplet":
            yield from ({"anchor": anchor, "positive": positive, "negative": text} for text in found)
        elif found:
            yield {"query": anchor, "documents": [positive, *found], "labels": [1] + [0] * len(found)}


def report(config: DictConfig, mined: Mined, *, n_pairs: int, n_candidates: int, n_lines: int) -> None:
    """Print numbers and mean similarities of what was found, and the command that trains on the file."""
    there = mined.scores.isfinite()
    short = int((there.sum(1) < config.negatives.n).sum())
    print(f"negatives   {int(there.sum()):,} for {n_pairs:,} pairs among {n_candidates:,} texts, {n_lines:,} lines")
    positive, negative = mined.positives.mean(), mined.scores[there].mean()
    print(f"similarity  positives {positive:.3f}, negatives {negative:.3f} (means)")
    if negative > positive:
        print(
            "shortcut    negatives are nearer than positives, and can be told by that alone: set negatives.relative_margin, or "
            "for a reranker of K candidates range_max=K positive_max_rank=K sampling=random (docs/classification.md)"
        )
    print(
        f"left out    {mined.excluded:,} by margins and scores; {short - mined.too_far:,} anchors have fewer than negatives.n"
    )
    if mined.too_far:
        print(f"too far     {mined.too_far:,} anchors, by negatives.positive_max_rank")
    form = config.negatives.format
    columns = {"data.negative": "negative"} if form == "triplet" else {}
    options = {"init_from": config.checkpoint, "data.path": config.out, **columns}
    print(f"next        python train.py objective={OBJECTIVES[form]} {shell_arguments(options)}")
