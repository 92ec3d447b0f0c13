"""A recipe's config: its keys, and reading, checking and publishing it."""
