"""Plan -> weights: what is written, where, and what that changes at once."""
