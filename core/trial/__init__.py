"""Short fine-tunes of several arms, and what may be said of them."""
