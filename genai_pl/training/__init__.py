"""Training: a run from its configuration to the exported folder, its resume, its sweeps and its rewards.

A run passes through these files in order: `train` (the command), `build` (objects from the configuration),
`initial_model` (weights and tokenizer before the first step), `trainer` (Lightning's Trainer and our callbacks),
`fit` (the loop and its end). The others serve them: `resume` and `sweeps` complete a command line, `trust` decides
what of a saved one counts, `run_folder` and `output_folders` own the files of a run, `config_errors` and
`unused_options` turn mistakes into one line.
"""
