"""python recipes.py: applications on real data, from the registry to something to look at; `--help` says how."""

import sys

from genai_pl.imports import ending_in_one_line

with ending_in_one_line():
    from genai_pl.recipes.command import main
    from genai_pl.signals import handle_signals


if __name__ == "__main__":
    with handle_signals():
        sys.exit(main(sys.argv[1:]))
