"""Conformance vectors: the network they speak of, the papers' formulas, and the code under test."""
