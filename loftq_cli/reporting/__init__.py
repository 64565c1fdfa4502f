"""What a finished output says: of itself, of its residuals, and on the hub."""
