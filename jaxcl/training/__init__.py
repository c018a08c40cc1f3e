"""Training over a sequence of tasks: the state, the step, evaluation and the loop around them."""
