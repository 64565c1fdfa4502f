"""What it brings to share a conversion: measured with processes of this machine, and simulated."""
