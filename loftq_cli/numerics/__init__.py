"""Pure maths on tensors: codebooks, quantizers, packing, low rank, alternation, metrics.

Nothing here reads a path or prints. Imports torch and ``loftq_cli.errors`` only.
"""
