# SPDX-License-Identifier: MIT OR Apache-2.0
"""Random inputs, and the comparison with the same call in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

STATES = ("c_initial", "n_initial", "m_initial")
DTYPES = ("float64", "float32", "bfloat16", "float16")


def inputs(rng, dtype="float32", *, b=2, nh=2, s=65, dhqk=16, dhhv=24, states=False, rows=None):
    """Arrays by the names of the kernels' arguments, gates and states in the dtype of n and m."""
    compute = "float64" if dtype == "float64" else "float32"
    rows = b if rows is None else rows
    shapes = dict(q=(b, nh, s, dhqk), k=(b, nh, s, dhqk), v=(b, nh, s, dhhv))
    shapes |= dict(i=(b, nh, s), f=(b, nh, s))
    if states:
        sizes = (rows, nh, dhqk, dhhv), (rows, nh, dhqk), (rows, nh)
        shapes |= dict(zip(STATES, sizes, strict=True))
    shift = {"i": -1, "f": 2}
    return {
        name: jnp.asarray(
            rng.standard_normal(shape) + shift.get(name, 0), dtype if name in "qkv" else compute
        )
        for name, shape in shapes.items()
    }


def bits(x):
    """The bit pattern of an array or a tensor."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        return (
            x.contiguous()
            .view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])
            .numpy()
        )
    x = np.asarray(x)
    return x.view(f"i{x.dtype.itemsize}")


def to_torch(x, device):
    """A copy as a tensor."""
    x = np.array(x)
    if x.dtype.kind in "iub":
        return torch.from_numpy(x).to(device)
    dtype = getattr(torch, x.dtype.name)
    return torch.from_numpy(x.view(f"i{x.dtype.itemsize}")).view(dtype).to(device)


def assert_same_bits(got, wanted):
    """Pairs of arrays or tensors, equal bit for bit; shapes up to dimensions of size 1."""
    got, wanted = jax.tree.leaves(got), jax.tree.leaves(wanted)
    assert len(got) == len(wanted)
    for position, (a, b) in enumerate(zip(got, wanted, strict=True)):
        a, b = bits(a), bits(b)
        assert a.size == b.size, f"{position}: shape {a.shape}, wanted {b.shape}"
        different = np.count_nonzero(a != b.reshape(a.shape))
        assert different == 0, f"{position}: {different} of {a.size} differ"


def incoming(rng, results):
    """Random incoming gradients."""
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), results)


def call(kernel, **options):
    """`kernel` as a function of arrays by name."""
    return lambda tensors: kernel(**tensors, **options)
