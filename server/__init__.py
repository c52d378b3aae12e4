"""The coordinator: rounds, aggregation, archive and report."""
