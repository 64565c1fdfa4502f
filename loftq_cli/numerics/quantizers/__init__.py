"""From weights to codes and back: codebooks, scales, packing and decoding."""
