"""Evaluation of heads for labels: accuracy and F1 of classes, error and correlation of numbers, places of documents."""

from collections.abc import Mapping, Sequence
from itertools import islice

import torch
from omegaconf import DictConfig
from torch import Tensor

from genai_pl.config.enums import Head
from genai_pl.config.labels import Labels, read_labels
from genai_pl.data import sources
from genai_pl.data.columns import parse_list, parse_text
from genai_pl.data.labels import encode_label, find_labels, label_index, parse_label_cell, parse_ranking
from genai_pl.data.text_tokens import encode_pairs
from genai_pl.devices import choose_device, weights_of
from genai_pl.errors import ConfigError, DataError
from genai_pl.evaluation import Metrics
from genai_pl.evaluation.labels import label_logits, label_metrics, rank, ranking_metrics, tag_metrics, tag_words
from genai_pl.loading import Loaded
from genai_pl.models.virtual_tokens import context_of
from genai_pl.progress import progress_bar
from genai_pl.training.hydra_job import job_overrides
from genai_pl.training.unused_options import NO_BOS_RULE, refuse_unused


def evaluate_labels(config: DictConfig, loaded: Loaded) -> dict[str, float]:
    """Metrics of a classifier on the rows of `data`, printed, with the number of rows."""
    refuse_unused(config, job_overrides(), [NO_BOS_RULE])
    options, model_config = config.data, loaded.model.config
    if options.column is not None or options.last_word or options.stride is not None:
        raise ConfigError(
            "data.column, last_word and stride are for language models; a classifier reads text and label"
        )
    labels = read_labels(model_config.extra, model_config.n_labels)
    source = sources.shipped_validation(options.path) or sources.find_source(
        options.path, columns=dict(options.columns)
    )
    if model_config.head is Head.tokens:
        return evaluate_tags(config, loaded, source)
    if len(labels.names) == 1 and {options.query, options.document} <= set(sources.column_names(source)):
        return evaluate_ranking(config, loaded, source)
    if labels.pairs and options.text_pair is None:
        ranking = " (or of queries and lists of documents: data.query, data.document)" if len(labels.names) == 1 else ""
        raise ConfigError(
            f"data.text_pair: the model reads pairs of texts; name the column of the second ones{ranking}"
        )
    texts, pairs, cells = read_labelled(config, source)
    labels = labels if labels.problem_type else labels._replace(problem_type=problem_of(cells, labels))
    targets = torch.tensor(encode_all(labels, cells, options.path))
    rows = encode_pairs(loaded.tokenizer, texts, pairs, max_length=max_length(options, loaded))
    metrics = label_metrics(outputs(config, loaded, rows, len(texts)), targets, labels)
    print_metrics(metrics)
    print(f"{'n':<22}{len(texts):>12,} rows")
    return {**metrics, "rows": len(texts)}


def evaluate_ranking(config: DictConfig, loaded: Loaded, source: sources.Source) -> dict[str, float]:
    """Mean reciprocal rank and recall@1 of a reranker, printed, over queries with relevant and other documents."""
    options = config.data
    columns = {name: options[name] for name in ("query", "document", "relevance")}
    sources.check_columns(
        source, sources.column_names(source), {f"data.{name}": column for name, column in columns.items()}
    )
    # rows of one query are its documents, whether they are lists or one by one
    queries: dict[str, tuple[list[str], list[float]]] = {}
    for place, record in sources.read_records(source, {*columns.values()}):
        query, documents, relevance = parse_ranking(record, [*columns.values()], place)
        if query not in queries and len(queries) == config.limit:
            continue
        known = queries.setdefault(query, ([], []))
        known[0].extend(documents)
        known[1].extend(relevance)
    usable = {query: row for query, row in queries.items() if 0 < sum(map(bool, row[1])) < len(row[1])}
    if not usable:
        raise DataError(f"data.path={options.path}: no query has both a relevant document and another one")
    # one pass over all pairs
    pairs = [(query, document) for query, (documents, _) in usable.items() for document in documents]
    rows = encode_pairs(loaded.tokenizer, *map(list, zip(*pairs, strict=True)), max_length=max_length(options, loaded))
    scores = iter(outputs(config, loaded, rows, len(pairs))[:, 0].tolist())
    ranks = [rank([next(scores) for _ in wanted], [*map(bool, wanted)]) for _, wanted in usable.values()]
    metrics = ranking_metrics(ranks)
    print_metrics(metrics)
    left = f", {len(queries) - len(usable):,} left out" if len(queries) > len(usable) else ""
    print(f"{'n':<22}{len(usable):>12,} queries, {len(pairs):,} documents{left}")
    return {**metrics, "queries": len(usable), "documents": len(pairs)}


def evaluate_tags(config: DictConfig, loaded: Loaded, source: sources.Source) -> dict[str, float]:
    """Precision, recall and F1 of entities and accuracy of tags, printed."""
    options, model_config = config.data, loaded.model.config
    columns = {"data.tokens": options.tokens, "data.tags": options.tags}
    sources.check_columns(source, sources.column_names(source), columns)
    labels = read_labels(model_config.extra, model_config.n_labels)
    sentences, true = [], []
    for place, record in islice(sources.read_records(source, {*columns.values()}), config.limit):
        words = parse_list(record.get(options.tokens), place.at(options.tokens), parse_text)
        at = place.at(options.tags)
        indices = [
            (tag, label_index(labels, tag)) for tag in parse_list(record.get(options.tags), at, parse_label_cell)
        ]
        if unknown := [tag for tag, index in indices if index is None]:
            raise DataError(f"{at}: {unknown[0]!r} is not one of the tags {', '.join(labels.names)}")
        if len(words) != len(indices):
            raise DataError(f"{at}: {len(indices)} tags for {len(words)} words: give each word one")
        sentences.append(words)
        true.append([labels.names[index] for _, index in indices])
    if not any(sentences):
        raise DataError(f"data.path={options.path}: no words")
    limits = {"max_length": max_length(options, loaded), "batch_tokens": config.batch_tokens}
    loaded.model.to(choose_device(config.device))
    metrics = tag_metrics(tag_words(loaded.model, loaded.tokenizer, sentences, **limits), true)
    print_metrics(metrics)
    print(f"{'n':<22}{len(sentences):>12,} sentences, {sum(map(len, sentences)):,} words")
    return {**metrics, "sentences": len(sentences)}


def max_length(options: DictConfig, loaded: Loaded) -> int:
    """Tokens of a text at most: data.seq_len, or the model's context; ConfigError for more than that."""
    context = context_of(loaded.model)
    if (options.seq_len or 0) > context:
        raise ConfigError(
            f"data.seq_len={options.seq_len}: more than the model's context of {context} tokens; lower it"
        )
    return options.seq_len or context


def outputs(config: DictConfig, loaded: Loaded, rows: Mapping[str, Sequence[Sequence[int]]], n: int) -> Tensor:
    """The outputs (N, K) of the model for tokenized rows, with a bar on a terminal."""
    device = choose_device(config.device)
    products = weights_of(config.precision.lightning, config.dtype, device)[1]
    with (
        progress_bar(n, "evaluating", leave=False) as bar,
        torch.autocast(device.type, dtype=products, enabled=products is not None),
    ):
        return label_logits(loaded.model.to(device), rows, batch_tokens=config.batch_tokens, on_batch=bar.update)


def read_labelled(config: DictConfig, source: sources.Source) -> tuple[list[str], list[str] | None, list[object]]:
    """Texts, second texts (None without them) and label cells of the rows of `data`."""
    options = config.data
    columns = {"text": options.text, "label": options.label}
    if options.text_pair is not None:
        columns["text_pair"] = options.text_pair
    sources.check_columns(
        source, sources.column_names(source), {f"data.{role}": column for role, column in columns.items()}
    )
    texts, pairs, cells = [], [], []
    for place, record in sources.read_records(source, {*columns.values()}):
        if config.limit is not None and len(texts) == config.limit:
            break
        texts.append(parse_text(record.get(options.text), place.at(options.text)))
        if options.text_pair is not None:
            pairs.append(parse_text(record.get(options.text_pair), place.at(options.text_pair)))
        cells.append(parse_label_cell(record.get(options.label), place.at(options.label)))
    if not texts:
        raise DataError(f"data.path={options.path}: no rows")
    return texts, pairs if options.text_pair is not None else None, cells


def problem_of(cells: list[object], labels: Labels) -> str:
    """The problem type of a folder that states none: by the labels of the data, for one output a regression."""
    if len(labels.names) == 1:
        return "regression"
    return find_labels(cells, names=labels.names, problem_type=None, known=None).problem_type


def encode_all(labels: Labels, cells: list[object], path: str) -> list[list[float]]:
    """The targets of label cells; DataError with the number of the row for one that the model does not have."""
    targets = []
    for n, cell in enumerate(cells, start=1):
        try:
            targets.append(encode_label(labels, cell))
        except DataError as error:
            raise DataError(f"data.path={path}: row {n}: {error}") from None
    return targets


def print_metrics(metrics: Metrics) -> None:
    """Print one metric a line, aligned."""
    width = max([22, *(len(name) + 2 for name in metrics)])
    for name, value in metrics.items():
        print(f"{name:<{width}}{value:>12.4f}")
