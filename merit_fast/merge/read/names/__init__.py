"""One map between the names in a model's files and its parameters' names in memory."""
