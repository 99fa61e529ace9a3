"""Where files of data come from: cards, their sources, downloads, archives."""
