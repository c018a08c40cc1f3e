"""Contrastive learning of pairs, with negatives of the batch, of all devices, or of a memory bank: the buffer's second use."""
