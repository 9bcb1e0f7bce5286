"""Recipes: applications on real data; what `experiment=NAME` trains on, and the display of what a run learned.

Each module has `find(work)`, the files of the data, downloaded into the folder `work` where they are not installed;
`prepare(files, out)`, which writes train.jsonl and val.jsonl; and `show(generate, data, out)`, which lets the trained
model write and returns lines for the terminal. `shakespeare` has only the last, as its text is shipped.
"""

RECIPES = ("shakespeare", "code", "translation", "summarization", "qa", "digits", "draw", "music")

__all__ = ["RECIPES"]
