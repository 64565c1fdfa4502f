"""The converted model, trained against its original: block by block, and end to end."""
