"""Many hospitals on one machine: phantoms, partitions, local backends and benchmarks."""
