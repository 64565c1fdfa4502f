"""What was asked for: options, recipes, and the files that hold them."""
