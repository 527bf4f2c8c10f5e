# SPDX-License-Identifier: MIT OR Apache-2.0
"""The targets as xla_ffi/README.md documents them, called without the Python package."""

import ctypes
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from arrays import assert_same_bits, inputs

import mlstm
from mlstm.jax.chunkwise import mlstm_chunkwise__xl_chunk

DOCUMENT = Path(__file__).resolve().parents[2] / "xla_ffi" / "README.md"


def test_the_documents_example():
    """The block runs as it stands, with no package but jax."""
    code = DOCUMENT.read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("/path/to", mlstm.library_dir())
    code += textwrap.dedent(
        """
        import sys
        assert "mlstm" not in sys.modules
        print(h.shape, h.dtype)
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd="/"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[-2] == "(1, 2, 100, 32) float32"


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.fixture
def tensors(device, rng):
    return inputs(rng)


def test_trailing_operands_and_results_may_be_left_out(tensors):
    (h,) = jax.ffi.ffi_call("mlstm_chunkwise_fw", [shape(2, 2, 65, 24)])(*tensors.values())
    assert_same_bits(h, mlstm_chunkwise__xl_chunk(**tensors, chunk_size=None))


def test_tokens_first(tensors):
    call = jax.ffi.ffi_call("mlstm_chunkwise_fw", [shape(2, 65, 2, 24)])
    (h,) = call(*(x.swapaxes(1, 2) for x in tensors.values()), tokens_first=True)
    assert_same_bits(h.swapaxes(1, 2), mlstm_chunkwise__xl_chunk(**tensors, chunk_size=None))


@pytest.mark.parametrize("target", ["mlstm_chunkwise_fw", "mlstm_chunkwise_fw_graph"])
def test_workspace_as_a_result(target, tensors):
    absent = shape(0, dtype=jnp.bool_)
    types = [shape(2, 2, 65, 24), *[absent] * 5, shape(2**24, dtype=jnp.uint8)]
    h = jax.ffi.ffi_call(target, types)(*tensors.values())[0]
    assert_same_bits(h, mlstm_chunkwise__xl_chunk(**tensors, chunk_size=None))
    types[-1] = shape(8, dtype=jnp.uint8)
    with pytest.raises(jax.errors.JaxRuntimeError, match="workspace"):
        jax.block_until_ready(jax.ffi.ffi_call(target, types)(*tensors.values()))


def test_recorded_calls_take_no_scratch_memory(device, tensors):
    call = jax.ffi.ffi_call("mlstm_chunkwise_fw_graph", [shape(2, 2, 65, 24)])
    if device == "cpu":  # where nothing is recorded
        call(*tensors.values())
        return
    with pytest.raises(jax.errors.JaxRuntimeError, match="workspace"):
        jax.block_until_ready(call(*tensors.values()))


@pytest.mark.parametrize(
    "extra, results, attributes, message",
    [
        ([], 1, {"flagz": 1}, "attributes: expected none but flags, .* tokens_first, got 1 others"),
        ([], 1, {"flags": 0.5}, "flags: .*expected S64 but got F64"),
        ([], 1, {"flags": 2**20}, "flags: this library does not know"),
        ([], 1, {"gate": 7}, "gate: expected"),
        ([0.0] * 5, 1, {}, "operands: expected at most 9, got 10"),
        ([], 8, {}, "results: expected at most 7, got 8"),
    ],
)
def test_refusals(extra, results, attributes, message, tensors):
    call = jax.ffi.ffi_call("mlstm_chunkwise_fw", [shape(2, 2, 65, 24)] * results)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(*tensors.values(), *map(jnp.float32, extra), **attributes))


def test_too_few_operands(tensors):
    call = jax.ffi.ffi_call("mlstm_chunkwise_fw", [shape(2, 2, 65, 24)])
    with pytest.raises(jax.errors.JaxRuntimeError, match="i: expected"):
        jax.block_until_ready(call(*list(tensors.values())[:3]))


def test_lowered_for_cuda(rng):
    """Without a GPU too: calls that may be recorded, with a workspace that XLA plans."""
    last_error = ctypes.CDLL(f"{mlstm.library_dir()}/libmlstm.so.0").mlstm_last_error
    last_error.restype = ctypes.c_char_p
    tensors = inputs(rng, states=True)

    def gradient(tensors):
        return jax.grad(lambda x: mlstm_chunkwise__xl_chunk(**x).sum())(tensors)

    text = jax.jit(gradient).trace(tensors).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("mlstm_chunkwise_fw_graph", "mlstm_chunkwise_bw_graph"):
        (call,) = (line for line in text.splitlines() if f"@{name}" in line)
        sizes = [int(size) for size in re.findall(r"tensor<(\d+)xui8>", call)]
        assert sizes[0] > 1000 or b"no CUDA backend" in last_error()
