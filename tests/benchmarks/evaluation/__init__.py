"""What a start is worth after training: sentence classification on real weights and real text."""
