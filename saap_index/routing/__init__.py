"""Keys to lists and queries to lists: quantizer, router, two-tower router, calibration, and the RoPE that is undone for both."""
