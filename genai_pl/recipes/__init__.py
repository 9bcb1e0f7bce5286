"""Applications on real data: what `experiment=NAME` trains on, and how to see what came of it. One file for each."""
