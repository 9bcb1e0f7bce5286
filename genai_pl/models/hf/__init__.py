"""Folders of Hugging Face transformers, read and written.

`config.py` and `weights.py` translate families of models into ours, by the tables of `families/`; `folder.py` and `ties.py`
read the files. `transformers_model.py` runs any other causal language model with transformers' layers and our attention
(`model=hf`), once `transformers_check.py` has compared the two.
"""
