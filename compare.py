"""python compare.py FOLDER [--metric val/loss]: which of the runs below a folder won, as a table and a picture."""

from genai_pl.imports import ending_in_one_line

with ending_in_one_line():
    from genai_pl.cli.compare import main
    from genai_pl.signals import handle_signals


if __name__ == "__main__":
    with handle_signals():
        main()
