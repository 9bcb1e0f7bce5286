"""GGUF: the file format of llama.cpp and Ollama, written from our models and read into them.

`architectures.py` says which families llama.cpp computes, and under which names; `metadata.py` and `rope.py` translate
configurations, `writer.py` and `reader.py` files. Tokenizers are in `data/gguf_tokenizer.py`.
"""
