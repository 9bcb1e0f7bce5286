"""Reranking of words by their definitions, against the embedding search of the model that it starts from.

    python benchmarks/rerank.py data OUT
    python feedback.py task=negatives checkpoint=MINILM data.path=OUT/train.jsonl negatives.format=ranking \
      negatives.n=5 negatives.relative_margin=null out=OUT/rankings.jsonl
    python train.py objective=rerank objective.loss=listwise init_from=MINILM data.path=OUT/rankings.jsonl data.seq_len=64
    python benchmarks/rerank.py score OUT MINILM RUN

`data` writes definitions of nouns with their word, of WordNet 3.0 (Debian's wordnet-base): 1,000 for the test, others for
training. `score` lets MINILM find the --depth nearest words of each definition among those of the test, puts them in the
order of RUN's scores, and prints recall@1 before and after, with a 95 % interval of the difference (bootstrap over definitions).
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from genai_pl.recipes.fetch import from_apt, read_rows, write_rows

N_TEST, N_TRAIN = 1000, 6000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data")
    data.add_argument("out", type=Path)
    score = commands.add_parser("score")
    score.add_argument("out", type=Path, help="the folder of `data`")
    score.add_argument("searcher", help="a model of embeddings")
    score.add_argument("reranker", help="a run of objective=rerank")
    score.add_argument("--depth", type=int, default=10, help="words that are reranked")
    score.add_argument("--seq-len", type=int, default=64, help="tokens of a pair, as in training")
    return parser.parse_args()


def write_data(out: Path) -> None:
    """Write definitions with their words, shuffled; the last N_TEST are the test, and no word is on both sides."""
    with tempfile.TemporaryDirectory() as work:
        (path,) = from_apt("wordnet-base", "usr/share/wordnet/data.noun", Path(work))
        lines = path.read_text(encoding="utf-8").splitlines()
    found: dict[str, str] = {}  # definition by word
    for line in lines:
        fields, _, gloss = line.partition(" | ")
        if not line.startswith(" "):  # the licence
            word, definition = fields.split()[4].replace("_", " "), gloss.split(";")[0].strip()
            if word.islower() and definition.count(" ") >= 4:
                found.setdefault(word, definition)
    words = sorted(found)
    words = [words[n] for n in np.random.default_rng(0).permutation(len(words))]
    for name, part in (("train", words[:N_TRAIN]), ("test", words[-N_TEST:])):
        rows = [{"anchor": found[word], "positive": word} for word in part]
        print(f"{write_rows(out / f'{name}.jsonl', rows):,} pairs in {out / name}.jsonl")


def search(rows: list[dict[str, str]], name: str) -> torch.Tensor:
    """Cosines (Q, N) of all anchors and all positives."""
    from genai_pl.evaluation.embeddings import embed, encode_sentences, find_sentence_head
    from genai_pl.loading import load

    model, tokenizer, path = load(name)
    head = find_sentence_head(None, path, tokenizer, model.config)
    texts = [[row[role] for row in rows] for role in ("anchor", "positive")]
    encoded = [encode_sentences(tokenizer, part, head, max_length=model.config.max_seq_len) for part in texts]
    anchors, candidates = (torch.nn.functional.normalize(embed(model, part, head), dim=-1) for part in encoded)
    return anchors @ candidates.T


def rerank(rows: list[dict[str, str]], nearest: torch.Tensor, name: str, seq_len: int) -> torch.Tensor:
    """Scores (Q, depth) of each anchor with its nearest candidates (Q, depth)."""
    from genai_pl.data.text_tokens import encode_pairs
    from genai_pl.evaluation.labels import label_logits
    from genai_pl.loading import load

    model, tokenizer, _ = load(name)
    queries = [rows[n]["anchor"] for n in range(len(rows)) for _ in range(nearest.shape[1])]
    documents = [rows[n]["positive"] for n in nearest.flatten().tolist()]
    encoded = encode_pairs(tokenizer, queries, documents, max_length=seq_len)
    return label_logits(model, encoded, batch_tokens=4096)[:, 0].view(nearest.shape)


def interval(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the difference of two shares over the same queries (bootstrap, 10,000 draws)."""
    drawn = np.random.default_rng(0).integers(0, len(before), (10_000, len(before)))
    differences = (after - before)[drawn].mean(1)
    return tuple(np.quantile(differences, (0.025, 0.975)))


def main() -> None:
    args = parse()
    if args.command == "data":
        return write_data(args.out)
    rows = read_rows(args.out / "test.jsonl")
    similarity = search(rows, args.searcher)
    nearest = similarity.topk(args.depth, dim=1).indices
    order = rerank(rows, nearest, args.reranker, args.seq_len).argsort(dim=1, descending=True)
    own = torch.arange(len(rows))[:, None]
    hits = {"embeddings": nearest == own, "reranked": nearest.gather(1, order) == own}
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
