"""Pure maths on tensors: codebooks, quantizers, packing, low rank, alternation, metrics.

Nothing here reads a path or prints. Imports torch, ``loftq_cli.errors`` and what runs the kernels
only; the registry of methods tells the manifest's schema its names.
"""
