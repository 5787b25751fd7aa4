"""What a search reads and makes of it: parameters, plan, selection, softmax states, statistics."""
