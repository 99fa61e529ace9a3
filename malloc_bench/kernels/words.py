"""How codes of few bits, their scales and offsets lie in memory: what readers and loops agree on."""

WORDS = {1: (8, 1), 2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}  # bits: codes in a word, bytes of a word
GIVEN, MIDDLE, BYTES = range(3)  # how scales and offsets are written, see `affine.Affine`
WIDE = 1 << 10  # numbers of a vector: loops whose width is a constant would take long to compile for more
FEW = 4  # queries that read vectors one after the other; of more they are unpacked once, see `reading.Reader.most`
