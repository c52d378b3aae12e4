"""A hospital: its image store, its settings, and what it answers to the coordinator."""
