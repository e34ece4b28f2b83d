"""The Triton kernels. A module is imported when its kernel runs, because Triton is not always installed."""
