"""python recipes.py: applications on real data, from the registry to something to look at; `--help` says how."""

import sys

from genai_pl.recipes.command import main
from genai_pl.signals import taken

if __name__ == "__main__":
    with taken():
        sys.exit(main(sys.argv[1:]))
