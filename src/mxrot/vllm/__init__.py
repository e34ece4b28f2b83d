"""Checkpoints in vLLM: what it makes of one, the form that it reads, and the plugin that runs all of them.

Nothing is imported here: vLLM looks at `plugin` in each of its processes.
"""
