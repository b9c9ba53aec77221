"""What needs a GPU: ``python -m benchmarks.gpu`` runs all of it."""
