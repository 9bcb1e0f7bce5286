"""Reranking of code by docstrings, against the embedding search of the same model.

    python benchmarks/rerank.py data OUT
    python feedback.py task=negatives checkpoint=MINILM data.path=OUT/train.jsonl negatives.format=ranking out=OUT/rankings.jsonl
    python train.py objective=rerank init_from=MINILM data.path=OUT/rankings.jsonl
    python benchmarks/rerank.py score OUT MINILM RUN

`data` writes pairs of docstrings and bodies of functions of the running Python's standard library: test.jsonl, 500 pairs of
files that training does not see, and train.jsonl. A body has no docstring, and its function is called f. `score` lets
MINILM find the nearest --depth bodies of each docstring among all bodies of the test, puts them in the order of RUN's
scores, and prints recall@1 before and after, with a 95 % interval of the difference (bootstrap over docstrings).
"""

import argparse
import ast
import json
from pathlib import Path

import numpy as np
import torch

from genai_pl.recipes.code import find, functions
from genai_pl.recipes.fetch import read_rows, write_rows

N_TEST, SHORTEST, LONGEST = 500, 60, 600  # pairs; characters of a body


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data")
    data.add_argument("out", type=Path)
    score = commands.add_parser("score")
    score.add_argument("out", type=Path, help="the folder of `data`")
    score.add_argument("searcher", help="a model of embeddings")
    score.add_argument("reranker", help="a run of objective=rerank")
    score.add_argument("--depth", type=int, default=10, help="bodies that are reranked")
    score.add_argument("--seq-len", type=int, default=128, help="tokens of a pair, as in training")
    return parser.parse_args()


def pairs_of(path: Path) -> dict[str, str]:
    """The first paragraph of each docstring of a module, and the function's body without it."""
    try:
        found = list(functions(path.read_text(encoding="utf-8")))
    except (SyntaxError, UnicodeDecodeError):  # the library has examples of invalid code
        return {}
    pairs = {}
    for _, node in found:
        text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        node.body, node.name = node.body[1:], "f"
        if len(text) > 24 and node.body and SHORTEST < len(body := ast.unparse(node)) < LONGEST:
            pairs.setdefault(text, body)
    return pairs


def write_data(out: Path) -> None:
    """Write the pairs of shuffled files, the first N_TEST of them for the test; no text is on both sides."""
    files = find(Path())
    test: dict[str, str] = {}
    train: dict[str, str] = {}
    for n in np.random.default_rng(0).permutation(len(files)):
        (test if len(test) < N_TEST else train).update(pairs_of(files[n]))
    test = dict(list(test.items())[:N_TEST])
    bodies = set(test.values())
    train = {text: body for text, body in train.items() if text not in test and body not in bodies}
    for name, pairs in (("train", train), ("test", test)):
        rows = [{"anchor": text, "positive": body} for text, body in pairs.items()]
        print(f"{write_rows(out / f'{name}.jsonl', rows):,} pairs in {out / name}.jsonl")


def search(rows: list[dict[str, str]], name: str) -> torch.Tensor:
    """Cosines (Q, N) of all docstrings and all bodies."""
    from genai_pl.evaluation.embeddings import embed, encode_sentences, find_sentence_head
    from genai_pl.loading import load

    model, tokenizer, path = load(name)
    head = find_sentence_head(None, path, tokenizer, model.config)
    texts = [[row[role] for row in rows] for role in ("anchor", "positive")]
    encoded = [encode_sentences(tokenizer, part, head, max_length=model.config.max_seq_len) for part in texts]
    anchors, bodies = (torch.nn.functional.normalize(embed(model, part, head), dim=-1) for part in encoded)
    return anchors @ bodies.T


def rerank(rows: list[dict[str, str]], nearest: torch.Tensor, name: str, seq_len: int) -> torch.Tensor:
    """Scores (Q, depth) of each docstring with its nearest bodies (Q, depth)."""
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
