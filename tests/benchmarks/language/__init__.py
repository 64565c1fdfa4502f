"""What a start is worth on a language model: before any training, and after a little of it."""
