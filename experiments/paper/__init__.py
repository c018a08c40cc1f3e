"""The figures of docs/paper.md, each from recorded runs: see `__main__.py`."""
