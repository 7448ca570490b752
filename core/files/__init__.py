"""Values <-> files: whole or not at all."""
