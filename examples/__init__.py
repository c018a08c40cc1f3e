"""The rehearsal buffer in loops of one's own; each file runs alone."""
