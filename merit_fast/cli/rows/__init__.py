"""Commands on stored rows: select, duplicates and outliers."""
