"""One layer, from keys and queries to quantizer and router."""
