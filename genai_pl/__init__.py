"""The whole life of a language model in one Lightning Trainer."""
