"""The loops that sum rows by group, for a compiler."""

from functools import partial

from malloc_bench.kernels.loops import EXACT, jit


@partial(jit, how=EXACT)
def added(x, group, out, start, stop):  # type: ignore[no-untyped-def]
    for n in range(start, stop):
        for s in range(x.shape[1]):
            g = group[n, s]
            if g < out.shape[1]:
                for d in range(x.shape[2]):
                    out[n, g, d] += x[n, s, d]


@partial(jit, how=EXACT)
def weighed(x, group, weight, out, start, stop):  # type: ignore[no-untyped-def]
    for n in range(start, stop):
        for s in range(x.shape[1]):
            g = group[n, s]
            if g < out.shape[1]:
                for d in range(x.shape[2]):
                    out[n, g, d] += x[n, s, d] * weight[n, s]
