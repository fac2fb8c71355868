"""The sketch stage: a mixture of datasets in, files of sums and rows out."""
