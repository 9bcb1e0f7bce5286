"""Reranking of WordNet's nouns by a definition, against the embedding search of the model that it starts from.

    python benchmarks/rerank.py data TASK OUT
    python feedback.py task=negatives checkpoint=MINILM data.path=OUT/train.jsonl negatives.format=ranking negatives.n=5 \
      negatives.relative_margin=null negatives.range_max=10 negatives.positive_max_rank=10 negatives.sampling=random \
      out=OUT/rankings.jsonl
    python train.py objective=rerank objective.loss=listwise init_from=MINILM data.path=OUT/rankings.jsonl data.seq_len=64 \
      optimizer.lr=1e-4 trainer.max_steps=500
    python benchmarks/rerank.py score OUT MINILM RUN

TASK is `category`, from the definition of a noun to the noun above it in WordNet's taxonomy ("the basic unit of money in
Vietnam" to "Vietnamese monetary unit"; the task of SemEval-2016, 14), or `word`, to the noun itself. `data` writes 1,000
definitions for the test, others for training, and the nouns among which all of them search, of WordNet 3.0 (Debian's
wordnet-base). `score` lets MINILM find the --depth nearest nouns of each definition, puts them in the order of RUN's scores, and
prints recall@1 before and after, with a 95 % interval of the difference (bootstrap over definitions).
"""

import argparse
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from genai_pl.recipes.fetch import from_apt, read_rows, write_rows

N_TEST, N_TRAIN = 1000, {"category": 10_000, "word": 6000}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data")
    data.add_argument("task", choices=N_TRAIN)
    data.add_argument("out", type=Path)
    score = commands.add_parser("score")
    score.add_argument("out", type=Path, help="the folder of `data`")
    score.add_argument("searcher", help="a model of embeddings")
    score.add_argument("reranker", help="a run of objective=rerank")
    score.add_argument("--depth", type=int, default=10, help="nouns that are reranked")
    score.add_argument("--seq-len", type=int, default=64, help="tokens of a pair, as in training")
    return parser.parse_args()


def write_data(task: str, out: Path) -> None:
    """Write definitions with their noun, shuffled, and the nouns among which the test searches.

    No definition is on both sides. Categories are, as new nouns come under the taxonomy that is there: the test searches all
    of them. Words are not: the test searches its own.
    """
    with tempfile.TemporaryDirectory() as work:
        (path,) = from_apt("wordnet-base", "usr/share/wordnet/data.noun", Path(work))
        lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (by_category if task == "category" else by_word)(lines)
    pairs = [pairs[n] for n in np.random.default_rng(0).permutation(len(pairs))]
    tested = {definition for definition, _ in pairs[-N_TEST:]}
    parts = {"train": [pair for pair in pairs[: N_TRAIN[task]] if pair[0] not in tested], "test": pairs[-N_TEST:]}
    searched = [*parts["test"], *(parts["train"] if task == "category" else ())]
    for name, part in parts.items():
        rows = [{"anchor": definition, "positive": noun} for definition, noun in part]
        print(f"{write_rows(out / f'{name}.jsonl', rows):,} pairs in {out / name}.jsonl")
    nouns = dict.fromkeys(noun for _, noun in searched)
    print(f"{write_rows(out / 'searched.jsonl', [{'text': noun} for noun in nouns]):,} nouns in {out}/searched.jsonl")


def by_word(lines: Iterable[str]) -> list[tuple[str, str]]:
    """(definition, word) of the first word of each set of synonyms, sorted by word."""
    found: dict[str, str] = {}  # definition by word
    for line in lines:
        fields, _, gloss = line.partition(" | ")
        if not line.startswith(" "):  # the licence
            word, definition = fields.split()[4].replace("_", " "), gloss.split(";")[0].strip()
            if word.islower() and definition.count(" ") >= 4:
                found.setdefault(word, definition)
    return [(found[word], word) for word in sorted(found)]


def by_category(lines: Iterable[str]) -> list[tuple[str, str]]:
    """(definition, the one noun above it) of nouns that have none below them; a noun is up to two of its synonyms."""
    nouns, definitions, above = {}, {}, {}
    for line in lines:
        fields, _, gloss = line.partition(" | ")
        if line.startswith(" "):  # the licence
            continue
        number, _, _, n_words, *rest = fields.split()
        n = 2 * int(n_words, 16)  # each word with a number, then the count of pointers, then four fields of each
        pointers = zip(*(rest[n + 1 + k :: 4] for k in range(4)), strict=False)
        nouns[number] = [word.replace("_", " ") for word in rest[:n:2]]
        definitions[number] = gloss.split('; "')[0].strip()  # without the examples
        above[number] = [other for kind, other, part, _ in pointers if (kind, part) == ("@", "n")]
    inner = {number for numbers in above.values() for number in numbers}
    return [
        (definitions[number], ", ".join(nouns[above[number][0]][:2]))
        for number in sorted(nouns)
        if number not in inner and len(above[number]) == 1 and 3 <= definitions[number].count(" ") < 20
        and nouns[number][0][0].islower()
    ]  # fmt: skip


def search(queries: Sequence[str], candidates: Sequence[str], name: str) -> torch.Tensor:
    """Cosines (Q, N) of queries and candidates."""
    from genai_pl.evaluation.embeddings import embed, encode_sentences, find_sentence_head
    from genai_pl.loading import load

    model, tokenizer, path = load(name)
    head = find_sentence_head(None, path, tokenizer, model.config)
    encoded = [
        encode_sentences(tokenizer, texts, head, max_length=model.config.max_seq_len) for texts in (queries, candidates)
    ]
    first, second = (torch.nn.functional.normalize(embed(model, rows, head), dim=-1) for rows in encoded)
    return first @ second.T


def rerank(
    queries: Sequence[str], candidates: Sequence[str], nearest: torch.Tensor, name: str, seq_len: int
) -> torch.Tensor:
    """Scores (Q, depth) of each query with its nearest candidates, whose numbers are (Q, depth)."""
    from genai_pl.data.text_tokens import encode_pairs
    from genai_pl.evaluation.labels import label_logits
    from genai_pl.loading import load

    model, tokenizer, _ = load(name)
    repeated = [query for query in queries for _ in range(nearest.shape[1])]
    documents = [candidates[n] for n in nearest.flatten().tolist()]
    encoded = encode_pairs(tokenizer, repeated, documents, max_length=seq_len)
    return label_logits(model, encoded, batch_tokens=4096)[:, 0].view(nearest.shape)


def interval(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the difference of two shares over the same queries (bootstrap, 10,000 draws)."""
    drawn = np.random.default_rng(0).integers(0, len(before), (10_000, len(before)))
    differences = (after - before)[drawn].mean(1)
    return tuple(np.quantile(differences, (0.025, 0.975)))


def main() -> None:
    args = parse()
    if args.command == "data":
        return write_data(args.task, args.out)
    queries, own = zip(*((row["anchor"], row["positive"]) for row in read_rows(args.out / "test.jsonl")), strict=True)
    candidates = [row["text"] for row in read_rows(args.out / "searched.jsonl")]
    nearest = search(queries, candidates, args.searcher).topk(args.depth, dim=1).indices
    order = rerank(queries, candidates, nearest, args.reranker, args.seq_len).argsort(dim=1, descending=True)
    wanted = torch.tensor([candidates.index(noun) for noun in own])[:, None]
    hits = {"embeddings": nearest == wanted, "reranked": nearest.gather(1, order) == wanted}
    recall = {name: hit[:, 0].float().numpy() for name, hit in hits.items()}
    ranks = torch.arange(1, args.depth + 1)
    figures = {
        name: {"recall@1": float(recall[name].mean()), f"mrr@{args.depth}": float((hit / ranks).sum(1).mean())}
        for name, hit in hits.items()
    }
    figures[f"recall@{args.depth}"] = float(hits["embeddings"].any(1).float().mean())
    low, high = interval(recall["embeddings"], recall["reranked"])
    figures["difference of recall@1"] = {"mean": float((recall["reranked"] - recall["embeddings"]).mean()),
                                         "low": float(low), "high": float(high)}  # fmt: skip
    print(json.dumps(figures, indent=1))
    return None


if __name__ == "__main__":
    main()
