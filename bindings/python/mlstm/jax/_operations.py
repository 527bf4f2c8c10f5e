# SPDX-License-Identifier: MIT OR Apache-2.0
"""The targets as JAX operations, with rules for vmap and for partitioning over devices."""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from mlstm.jax._targets import OPERANDS, RESULTS, Call, run


@cache
def operation(call: Call):
    """The function of the operands that are there to a tuple of the results that are wanted."""
    function = custom_vmap(_partitioned(call))
    function.def_vmap(partial(_batched, call))
    return jax.jit(function, inline=True)


# ---- vmap: the mapped axis becomes part of B, or of S where sequences are packed -----------------


def _batched(call, size, is_mapped, *operands):
    operands = {
        name: x if mapped else jnp.broadcast_to(x, (size, *x.shape))
        for name, x, mapped in zip(call.operands, operands, is_mapped, strict=True)
    }
    results = operation(call)(*(_fold(call, name, operands) for name in call.operands))
    return tuple(
        _unfold(x, _folded_axis(call, letters), size)
        for x, letters in zip(results, call.dims(RESULTS), strict=True)
    ), (True,) * len(results)


def _fold(call, name, operands):
    x = operands[name]
    row = jnp.arange(x.shape[0])[:, None]
    if name == "cu_seqlens":
        rows, s = x.shape[0], operands["q"].shape[3]
        starts = x[:, :-1] + (row * s).astype(x.dtype)
        return jnp.append(starts, jnp.asarray(rows * s, x.dtype))
    if name.endswith("_slots"):
        rows, slots = operands["c"].shape[:2]
        # A slot outside of the row's pool stays outside of all.
        inside = (x >= 0) & (x < slots)
        x = jnp.where(inside, x + (row * slots).astype(x.dtype), jnp.where(x < 0, x, rows * slots))
    axis = _folded_axis(call, OPERANDS[call.kind][name])
    return jax.lax.collapse(jnp.moveaxis(x, 0, axis), axis, axis + 2)


def _folded_axis(call, letters):
    return letters.index("s") if call.packed and "s" in letters else 0


def _unfold(x, axis, size):
    x = x.reshape(*x.shape[:axis], size, x.shape[axis] // size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


# ---- partitioning: rows and heads are independent, everything else is needed whole ---------------


def free_letters(call):
    """Letters of the dimensions along which devices can share the work."""
    return "h" if call.packed or call.slots else "bh"


def specs(free, operand_dims, operand_specs, result_dims):
    """PartitionSpecs of operands and of results that agree, given those of the operands."""
    axes = {}
    for letters, spec in zip(operand_dims, operand_specs, strict=True):
        for letter, axis in zip(letters, spec, strict=False):
            if letter in free and axis is not None:
                axes.setdefault(letter, axis)
    return tuple(
        tuple(PartitionSpec(*(axes.get(letter) for letter in letters)) for letters in words)
        for words in (operand_dims, result_dims)
    )


def _partitioned(call):
    free = free_letters(call)
    operand_dims, result_dims = call.dims(OPERANDS), call.dims(RESULTS)

    def local(*operands):
        # One device's part knows nothing of a mesh that the program has set.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return run(call, *operands)

    def partition(mesh, operands, results):
        given = tuple(tuple(x.sharding for x in arrays) for arrays in (operands, results))
        # Without a named mesh the partitioner has made them agree already.
        if all(isinstance(sharding, NamedSharding) for sharding in given[0]):
            found = specs(free, operand_dims, [x.spec for x in given[0]], result_dims)
            given = tuple(tuple(NamedSharding(mesh, x) for x in arrays) for arrays in found)
        return mesh, local, given[1], given[0]

    def infer(mesh, operands, results):
        return partition(mesh, operands, results)[2]

    def rule(words):
        return ", ".join(" ".join(letters) for letters in words)

    function = custom_partitioning(partial(run, call))
    function.def_partition(
        partition,
        infer,
        sharding_rule=f"{rule(operand_dims)} -> {rule(result_dims)}",
        # In the order of their first appearance.
        need_replication_factors=tuple(
            letter for letter in dict.fromkeys("".join(operand_dims)) if letter not in free
        ),
    )

    def checked(*operands):
        # Arrays of other ranks have no place in the rule; the library refuses them.
        fits = all(x.ndim == len(d) for x, d in zip(operands, operand_dims, strict=True))
        return (function if fits else partial(run, call))(*operands)

    return checked
