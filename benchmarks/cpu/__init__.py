"""What times work on a CPU."""
