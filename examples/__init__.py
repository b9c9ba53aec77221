"""Recipes: training, tables."""
