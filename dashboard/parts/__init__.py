"""Parts of pages that need a file of their own."""
