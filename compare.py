"""python compare.py FOLDER [--metric val/loss]: which of the runs below a folder won, as a table and a picture."""

from genai_pl.compare import main

if __name__ == "__main__":
    main()
