"""Weights that others have trained: reading their files, and finding their tensors' places in the networks here."""
