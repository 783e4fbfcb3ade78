"""The process and its devices: settings, messages, signals, meshes, memory.

The wing has one file a topic, each imported by itself: `console`, `devices`,
`processes`, `settings`, `signals` and `watchdog`. This package imports none of
them, since `console` and `signals` are used where JAX is not loaded.
"""
