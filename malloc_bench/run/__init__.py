"""A run: the runner, its session of groups of cells, the folder, progress, and rows made of per-user values."""
