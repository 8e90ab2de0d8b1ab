"""The machine: processes, memory and CPU kernels."""
