"""Checkpoints in vLLM: what vLLM does with one, the form that vLLM reads, and the plugin that runs all of them.

Nothing is imported here, because vLLM loads `plugin` in each of its processes.
"""
