"""The train step on a GPU: compiled without one, and checked on one."""
