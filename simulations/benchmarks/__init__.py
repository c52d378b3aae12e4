"""What xfed costs in time and memory: `python -m xfed.simulations.benchmarks.speed` and `.memory` (docs/benchmarks.md)."""
