"""Commands: one file per command with its work, and everything that belongs to Hydra.

`command` turns a function of a configuration into a command with one-line errors; `schema*` are the typed nodes
that Hydra composes into; `quoting` and `option_help` stand before and beside composition. The files at the
repository root are the entry points and import nothing else until a command line is understood: `--help` and a typo
take about a second, because neither torch nor transformers is loaded.
"""
