"""What a finished output makes of text, and how near that is to its original."""
