"""The tables: metrics, checks, rules and schemes, each with its help and source."""
