"""What stands in files of data: layouts, parsing, ids, and what becomes of bad input."""
