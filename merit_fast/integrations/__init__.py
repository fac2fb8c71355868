"""Foreign formats, read into the configs of the stages."""
