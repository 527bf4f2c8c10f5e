# SPDX-License-Identifier: MIT OR Apache-2.0
"""Arguments of `mlstm_kernels` that are accepted and ignored."""

# How to run the peers' Triton kernels; the library decides that by itself.
_TUNING = frozenset(
    """chunk_size_inter chunk_size_intra siz_b_L_parallel siz_b_L_loop siz_b_DH_parallel
    siz_b_DH_loop siz_b_DHQK siz_b_DHHV num_warps num_warps_intra num_warps_inter num_stages
    num_stages_intra num_stages_inter recompute_states_in_bw""".split()
)


def ignore_tuning(function, kwargs):
    """Raises a TypeError for every keyword but the tuning arguments of `mlstm_kernels`."""
    for name in kwargs:
        if name not in _TUNING:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
