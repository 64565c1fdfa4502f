"""What is known of models: by their names, and of their classes by their code."""
