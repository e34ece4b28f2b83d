"""What quantizing a model would take, from its config alone."""
