"""Second moments of the inputs of linear layers, in files."""
