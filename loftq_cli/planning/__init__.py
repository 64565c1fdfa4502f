"""Everything that is settled from headers, before anything is computed."""
