"""The kernels, in Triton. Imported where one runs: Triton is not everywhere."""
