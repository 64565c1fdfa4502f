"""What an adapter for a backbone that exists is worth, beside none and EoRA's."""
