"""Where tokens lie: the layout, a pure function of their number, and the inverted lists of a batch."""
