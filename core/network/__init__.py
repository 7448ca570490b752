"""Looking inside a network: what runs, in which order, and what hangs together."""
