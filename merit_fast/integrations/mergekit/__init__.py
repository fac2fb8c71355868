"""mergekit's YAML recipes, read into this package's merges. What is not supported is named in an error."""
