"""The figures of docs/paper.md, one file each, from recorded runs: see `__main__.py`."""
