"""Generated data, and the best that anyone could predict of it."""
