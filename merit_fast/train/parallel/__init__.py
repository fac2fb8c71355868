"""Several processes that train one branch: ``world`` tells how many, ``ranks`` lets them add."""
