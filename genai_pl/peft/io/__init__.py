"""Adapter folders in PEFT's layout: adapter_config.json and adapter_model.safetensors, written and read.

folder.py is the entry; lora.py, ia3.py and native.py convert adapters; hf_names.py maps our modules to transformers' names.
"""
