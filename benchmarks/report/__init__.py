"""The machine beside the numbers, and tables and figures out of saved results."""
