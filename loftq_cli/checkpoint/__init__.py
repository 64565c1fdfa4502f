"""Reading checkpoints (headers, index, tensors, hub) and writing shards durably."""
