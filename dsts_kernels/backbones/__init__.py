"""DSTS in models of other people: on top of the modules; nothing below imports it."""

from .insertion import freeze_dsts, insert_dsts, remove_dsts
from .layouts import LAYOUTS, FeatureLayout

__all__ = ["LAYOUTS", "FeatureLayout", "freeze_dsts", "insert_dsts", "remove_dsts"]
