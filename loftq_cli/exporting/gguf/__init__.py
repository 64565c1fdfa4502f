"""GGUF, the files of llama.cpp: a model's file with the codes of a conversion in it."""
