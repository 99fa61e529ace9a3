"""One pass of attention over plain vectors, for a compiler."""

from __future__ import annotations

from functools import cache

import numpy as np

from malloc_bench.kernels.loops import f32, i32, inlined, jit, zero

one = f32(1)


@inlined
def exponentials(x, size, powers, turned):  # type: ignore[no-untyped-def]
    """x[s] = exp(x[s]) to float32's last digit or two: 2^n e^r, |r| <= ln 2 / 2, in steps that go in vectors; what is
    no number stays none. powers: room [S] int32, `turned` the same as float32."""
    for s in range(size):
        here = min(max(x[s], f32(-87)), f32(88))
        n = np.rint(here * f32(1.4426950408889634))
        r = here - n * f32(0.693359375) - n * f32(-2.12194440e-4)
        powers[s] = (i32(n) + i32(127)) << i32(23)
        p = f32(1.9875691500e-4) * r + f32(1.3981999507e-3)
        p = (p * r + f32(8.3334519073e-3)) * r + f32(4.1665795894e-2)
        p = (p * r + f32(1.6666665459e-1)) * r + f32(5.0000001201e-1)
        x[s] = p * r * r + r + one + zero * x[s]
    for s in range(size):
        x[s] *= turned[s]


@inlined
def products(row, keys, size, out):  # type: ignore[no-untyped-def]
    """out[s] = row . keys[s]; two at once."""
    even = size - size % 2
    for s in range(0, even, 2):
        a, b = zero, zero
        for d in range(keys.shape[1]):
            a += row[d] * keys[s, d]
            b += row[d] * keys[s + 1, d]
        out[s], out[s + 1] = a, b
    if even < size:
        a = zero
        for d in range(keys.shape[1]):
            a += row[d] * keys[even, d]
        out[even] = a


@inlined
def sums(weights, values, size, out):  # type: ignore[no-untyped-def]
    """out += weights[s] values[s]; four at once."""
    fours = size - size % 4
    for s in range(0, fours, 4):
        a, b, c, d = weights[s], weights[s + 1], weights[s + 2], weights[s + 3]
        for j in range(values.shape[1]):
            out[j] += a * values[s, j] + b * values[s + 1, j] + c * values[s + 2, j] + d * values[s + 3, j]
    for s in range(fours, size):
        for j in range(values.shape[1]):
            out[j] += weights[s] * values[s, j]


@cache
def attention(softmax: bool):  # type: ignore[no-untyped-def]
    """The loop over rows [N] of users and heads; what is alike for several neighbours has fewer rows, what there is
    none of no columns. See `kernels.attend`."""

    @jit
    def attend(q, own_key, own_value, own_bias, keys, values, count, mass, bias, scale, room, out, start, stop):  # type: ignore[no-untyped-def]
        n, slots = len(q), keys.shape[1]
        weights, logits, turned = room[0], room[1], room[2]
        powers = turned.view(np.int32)
        for i in range(start, stop):
            size = min(slots, count[i // (n // len(count))])
            masses, biases = mass[i // (n // len(mass))], bias[i // (n // len(bias))]
            for m in range(q.shape[1]):
                products(q[i, m], keys[i], size, weights)
                itself = zero
                for d in range(q.shape[2]):
                    itself += q[i, m, d] * own_key[i, m, d]
                if biases.shape[0]:
                    for s in range(size):
                        weights[s] += biases[m, s]
                    itself += own_bias[i // (n // len(own_bias)), m]
                weights[size] = itself
                if softmax:
                    most = itself
                    for s in range(size):
                        most = max(most, weights[s])
                    for s in range(size + 1):
                        weights[s] -= most
                    exponentials(weights, size + 1, powers, turned)
                    if masses.shape[0]:
                        for s in range(size):
                            weights[s] *= max(masses[s], f32(1e-6))
                    whole = zero
                    for s in range(size + 1):
                        whole += weights[s]
                    for s in range(size + 1):
                        weights[s] /= whole
                else:
                    for s in range(size + 1):  # silu(x) = x / (1 + exp(-x))
                        logits[s] = weights[s] = -weights[s]
                    exponentials(weights, size + 1, powers, turned)
                    for s in range(size + 1):
                        weights[s] = -logits[s] / (one + weights[s]) * scale
                    if masses.shape[0]:
                        for s in range(size):
                            weights[s] *= masses[s]
                for d in range(out.shape[2]):
                    out[i, m, d] = weights[size] * own_value[i, m, d]
                sums(weights, values[i], size, out[i, m])

    return attend
