"""A person's choice -> plan; plan <-> JSON.

The resolved list of names is the authority. Patterns are kept beside it as provenance and are
never looked at again, so a plan means the same on the day a library renames its layers: it then
fails by name instead of resetting something else.
"""
