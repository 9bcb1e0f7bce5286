"""Applications on real data: what `experiment=NAME` trains on, and how to see what came of it. One file for each."""

RECIPES = ("shakespeare", "code", "translation", "summarization", "qa", "digits", "draw", "music")

__all__ = ["RECIPES"]
