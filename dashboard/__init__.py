"""The pages: choose, measure, pick, watch, export."""
