"""A branch's metrics: every step's numbers go in; metrics.jsonl and trackers get them."""
