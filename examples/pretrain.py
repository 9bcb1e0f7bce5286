"""A small GPT on the shipped Shakespeare: trained, loaded, asked. Overrides of the command line may follow."""

import sys

from genai_pl import generate, load, train


def main(*overrides: str) -> str:
    """What the trained model makes of a name."""
    run = train("model.n_layer=2", "model.n_embd=64", "trainer.max_steps=100", *overrides)
    loaded = load(str(run))
    return generate(loaded, "ROMEO:", max_new_tokens=40, temperature=0.8, top_k=20)


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
