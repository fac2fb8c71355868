"""One stack's form of rows and its configuration per file."""
