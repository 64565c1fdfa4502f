"""libllama and ggml of the npm package @node-llama-cpp/linux-x64, through ctypes: the decoders of
tensor types, and the logits of a model with an adapter.

Structures of parameters are passed as they are returned, in more room than they need: only fields
at their beginning, which have not moved for years, are set.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


class _Traits(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float", ctypes.c_void_p),
    )


class _Parameters(ctypes.Structure):
    _fields_ = (("raw", ctypes.c_uint32 * 256),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class Ggml:
    """ggml's base library in the folder of the package's binaries."""

    def __init__(self, folder: Path) -> None:
        self._library = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self._library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)

    def decoded(self, kind: int, raw: torch.Tensor, columns: int) -> torch.Tensor:
        """float32 (rows, columns) of uint8 (rows, bytes) by ggml's own decoder of a type."""
        traits = self._library.ggml_get_type_traits(kind)[0]
        decode = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(
            traits.to_float
        )
        held, result = raw.contiguous(), torch.empty(len(raw), columns)
        decode(held.data_ptr(), result.data_ptr(), result.numel())
        return result


class Llama:
    """A model's file, with the adapter's if there is one."""

    def __init__(self, folder: Path, model: Path, adapter: Path | None = None) -> None:
        for name in ("libggml-base.so", "libggml.v0.4.0.so"):
            ggml = ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
        library: Any = ctypes.CDLL(str(folder / "libllama.v0.4.0.so"), mode=ctypes.RTLD_GLOBAL)
        for name in (
            "llama_model_load_from_file",
            "llama_init_from_model",
            "llama_model_get_vocab",
        ):
            getattr(library, name).restype = ctypes.c_void_p
        library.llama_adapter_lora_init.restype = ctypes.c_void_p
        library.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
        library.llama_model_default_params.restype = _Parameters
        library.llama_context_default_params.restype = _Parameters
        library.llama_batch_init.restype = _Batch
        library.llama_backend_init()
        self._silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
            lambda level, text, data: None
        )
        library.llama_log_set(self._silence, None)
        self._library = library
        parameters = library.llama_model_default_params()
        self._model = library.llama_model_load_from_file(str(model).encode(), parameters)
        assert self._model, f"llama.cpp does not load {model}"
        settings = library.llama_context_default_params()
        settings.raw[0] = settings.raw[1] = settings.raw[2] = 512  # n_ctx, n_batch, n_ubatch
        self._context = library.llama_init_from_model(ctypes.c_void_p(self._model), settings)
        assert self._context
        if adapter is not None:
            found = library.llama_adapter_lora_init(
                ctypes.c_void_p(self._model), str(adapter).encode()
            )
            assert found, f"llama.cpp does not load {adapter}"
            adapters = (ctypes.c_void_p * 1)(found)
            scales = (ctypes.c_float * 1)(1.0)
            library.llama_set_adapters_lora(
                ctypes.c_void_p(self._context), adapters, ctypes.c_size_t(1), scales
            )

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """float32 (tokens, vocabulary), from an empty context."""
        library = self._library
        memory = library.llama_get_memory
        memory.restype = ctypes.c_void_p
        held = ctypes.c_void_p(memory(ctypes.c_void_p(self._context)))
        library.llama_memory_clear(held, ctypes.c_bool(True))
        batch = library.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = 1
        assert library.llama_decode(ctypes.c_void_p(self._context), batch) == 0
        vocabulary = ctypes.c_void_p(library.llama_model_get_vocab(ctypes.c_void_p(self._model)))
        width = library.llama_vocab_n_tokens(vocabulary)
        values = library.llama_get_logits(ctypes.c_void_p(self._context))
        raw = ctypes.string_at(values, 4 * len(tokens) * width)
        return torch.frombuffer(bytearray(raw), dtype=torch.float32).view(len(tokens), width)
