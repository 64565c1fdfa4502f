"""MLX: a conversion as mlx-lm loads, serves and trains one, and what it trained on the way back."""
