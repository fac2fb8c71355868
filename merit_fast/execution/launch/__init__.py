"""Job files of a run for schedulers and clouds: text that the user reads and submits."""
