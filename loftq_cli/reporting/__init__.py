"""Reading finished conversions: inspect, verify, error report."""
