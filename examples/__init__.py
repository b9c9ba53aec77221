"""The training recipe, the paper's tables, and short examples of one subject each."""
