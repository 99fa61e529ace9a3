"""Who does the groups of a run: this process, workers on this machine that are watched, or many machines."""
