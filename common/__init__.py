"""Shared by both sides: study files, models, training steps, messages, metrics. Imports neither side."""
