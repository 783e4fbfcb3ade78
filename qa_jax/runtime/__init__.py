"""The process and its devices: settings, messages, signals, meshes, memory.

This package imports none of its files, since `console` and `signals` are used
where JAX is not loaded.
"""
