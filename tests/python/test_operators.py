# SPDX-License-Identifier: MIT OR Apache-2.0
"""torch.ops.mlstm as PyTorch sees it: gradcheck, opcheck, torch.compile, autocast, errors."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mlstm.torch import get_available_mlstm_kernels, get_mlstm_kernel
from mlstm.torch.chunkwise import mlstm_chunkwise__xl_chunk
from mlstm.torch.recurrent import mlstm_recurrent_step, mlstm_recurrent_step_slots
from reference import (
    TOLERANCE,
    assert_close,
    error,
    flat,
    random_inputs,
    recurrence,
)

OPS = torch.ops.mlstm
NEEDS_COMPILER = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("gcc")), reason="Inductor needs a compiler"
)


def only_tensors(inputs):
    return [t for t in inputs if t is not None]


@pytest.mark.parametrize("name", get_available_mlstm_kernels())
def test_gradcheck(name, device):
    """All gradients of h, c, n and m against finite differences, with no oracle in between."""
    x = random_inputs(device, torch.float64, b=1, nh=2, s=5, dhqk=3, dhhv=4, states=True)
    if "siging" in name:
        x.m = None
    kernel = get_mlstm_kernel(name)
    leaves = only_tensors(x.leaves())

    def run(*tensors):
        return tuple(flat(kernel(*tensors, return_last_states=True, chunk_size=2)))

    assert torch.autograd.gradcheck(run, leaves)


# ---- opcheck ----------------------------------------------------------------------------------

FORWARD_OPTIONS = {
    "chunkwise": {},
    "states": {"return_last_states": True},
    "parallel": {"parallel": True, "return_last_states": True, "eps": 0.0, "qk_scale": 0.3},
    "low_precision_state": {"return_last_states": True, "state_dtype": torch.bfloat16},
    "detached": {"detach_denominator": True, "chunk_size": 16},
}


def operator_inputs(device, dtype=torch.float32, **sizes):
    x = random_inputs(device, dtype, **{"b": 2, "nh": 3, "s": 9, "dhqk": 8, "dhhv": 6} | sizes)
    return list(x)[:5], [x.c, x.n, None if x.m is None else x.m.squeeze(-1)]


@pytest.mark.parametrize("states", [False, True], ids=["from_zero", "from_state"])
@pytest.mark.parametrize("options", FORWARD_OPTIONS)
def test_opcheck_forward(options, states, device):
    options = FORWARD_OPTIONS[options]
    tokens, initial = operator_inputs(device, states=states)
    if states and "state_dtype" in options:
        initial[0] = initial[0].to(options["state_dtype"])
    for t in only_tensors([*tokens, *initial]):
        t.requires_grad_()
    torch.library.opcheck(OPS.forward.default, (*tokens, *initial, None), options)


def test_opcheck_forward_of_other_kinds(device):
    tokens, initial = operator_inputs(device, states=True)
    siging = {"siging": True, "return_last_states": True}
    torch.library.opcheck(OPS.forward.default, (*tokens, *initial[:2], None, None), siging)
    torch.library.opcheck(
        OPS.forward.default,
        (*tokens, None, None, None, None),
        {"siging": True, "normalize": False},
    )
    views = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in tokens]
    torch.library.opcheck(OPS.forward.default, (*views, *initial, None))
    tokens, initial = operator_inputs(device, torch.bfloat16, b=1, s=20)
    cu_seqlens = torch.tensor([0, 3, 3, 20], device=device)
    torch.library.opcheck(
        OPS.forward.default, (*tokens, None, None, None, cu_seqlens), {"return_last_states": True}
    )


def test_opcheck_backward_and_steps(device):
    tokens, initial = operator_inputs(device, s=4, states=True)
    h, n, m, *last = OPS.forward(*tokens, *initial, None, return_last_states=True)
    arguments = (torch.randn_like(h), *last, *tokens, *initial, None, h, n, m)
    torch.library.opcheck(OPS.backward.default, arguments, {"initial_gradients": True})
    torch.library.opcheck(
        OPS.backward.default, (h, None, None, None, *tokens, *[None] * 4, h, n, m)
    )
    torch.library.opcheck(OPS.step.default, (*tokens, *initial))
    torch.library.opcheck(OPS.step.default, (*tokens, *initial[:2], None), {"siging": True})
    torch.library.opcheck(OPS.step_.default, (*tokens, *initial))
    slots = torch.tensor([1, -1], device=device)
    torch.library.opcheck(OPS.step_.default, (*tokens, *initial, slots))


# ---- torch.compile ----------------------------------------------------------------------------


def train(kernel, inputs):
    """h, states and gradients of a scalar loss, with other operators around the kernel."""
    h, states = kernel(*(t * 1.5 for t in inputs), return_last_states=True)
    loss = (h * torch.linspace(-1, 1, h.shape[-1], device=h.device)).sum() + states[0].sum()
    return loss, h, *states


@pytest.mark.parametrize(
    "backend, dynamic",
    [
        ("aot_eager", False),
        ("aot_eager", True),
        pytest.param("inductor", True, marks=[pytest.mark.slow, NEEDS_COMPILER]),
    ],
)
def test_compile_fullgraph(backend, dynamic, device):
    torch.compiler.reset()
    compiled = torch.compile(train, fullgraph=True, dynamic=dynamic, backend=backend)
    # Inductor's compiler is slow: one shape must do.
    for b, s in [(2, 33), (3, 50)][: 1 if backend == "inductor" else 2]:
        x = random_inputs(device, b=b, s=s, states=True)
        results = []
        for function in (train, compiled):
            leaves = x.leaves()
            outputs = function(mlstm_chunkwise__xl_chunk, leaves)
            outputs[0].backward()
            results.append([*outputs, *leaves.gradients()])
        assert_close(*results, 1e-5)


def test_compile_every_kernel(device):
    for name in get_available_mlstm_kernels():
        torch.compiler.reset()
        kernel = get_mlstm_kernel(name)
        x = random_inputs(device, s=20)
        cu_seqlens = torch.tensor([0, 7, 20], device=device)
        packed = [t[:1] for t in list(x)[:5]]
        compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
        assert_close(flat(compiled(*x)), flat(kernel(*x)), 0.0)
        got = compiled(*packed, cu_seqlens=cu_seqlens, return_last_states=True)
        wanted = kernel(*packed, cu_seqlens=cu_seqlens, return_last_states=True)
        assert_close(flat(got), flat(wanted), 0.0)


def test_compile_with_autocast(device):
    torch.compiler.reset()
    x = random_inputs(device)

    def run(leaves):
        with torch.autocast(device, dtype=torch.bfloat16):
            return mlstm_chunkwise__xl_chunk(*leaves)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = x.leaves()
        h = function(leaves)
        assert h.dtype == torch.bfloat16
        h.sum().backward()
        results.append([h, *leaves.gradients()])
    assert_close(*results, 1e-6)


def test_compile_steps(device):
    """The functional step, and the in-place one through functionalisation."""
    torch.compiler.reset()
    x = random_inputs(device, b=2, s=1, states=True)
    slots = torch.tensor([3, 1], device=device)

    def generate(x, c, n, m, slots):
        h = mlstm_recurrent_step_slots(*x, c * 1.0, n, m, slots)  # on a copy
        h = h + mlstm_recurrent_step_slots(*x, c, n, m, slots)
        h = h + mlstm_recurrent_step_slots(*x, c, n, m, slots)
        out, _ = mlstm_recurrent_step(
            *(t[:, :, 0] for t in x[:3]), *x[3:], c[slots], n[slots], m[slots]
        )
        return h, out, c.sum((1, 2, 3))

    results = []
    for function in (generate, torch.compile(generate, fullgraph=True, backend="aot_eager")):
        pool = [torch.zeros(4, *t.shape[1:], device=device) for t in (x.c, x.n, x.m)]
        for t, state in zip(pool, (x.c, x.n, x.m), strict=True):
            t[slots] = state
        outputs = function(list(x)[:5], *pool, slots)
        results.append([*outputs, *pool])
    assert_close(*results, 1e-6)
    assert error(results[0][3][slots], x.c) > 1e-2, "the pool did not change"


# ---- TF32 and the portable engine --------------------------------------------------------------


@pytest.fixture(params=["legacy", "precision"])
def set_tf32(request):
    """Sets torch's switch under its old and its new name."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision

    def switch(on):
        if request.param == "legacy":
            matmul.allow_tf32 = on
        else:
            matmul.fp32_precision = "tf32" if on else "ieee"

    yield switch
    matmul.allow_tf32 = False  # the legacy name wants both to agree
    matmul.fp32_precision = before


def test_tf32_follows_torch(set_tf32, device):
    x = random_inputs(device, b=1, nh=2, s=200, dhqk=64, dhhv=96)
    double = x.map(torch.Tensor.double)
    results = []
    for inputs, on in ((double, False), (x, False), (x, True)):
        set_tf32(on)
        leaves = inputs.leaves()
        h = mlstm_chunkwise__xl_chunk(*leaves)
        set_tf32(False)  # the gradient is computed as its forward was
        h.square().sum().backward()
        results.append([h, leaves.v.grad])
    for wanted, exact, rounded in zip(*results, strict=True):
        if device == "cpu":
            assert torch.equal(exact, rounded)
        else:
            assert error(exact, wanted) < 1e-5
            assert 1e-5 < error(rounded, wanted) < 2e-3


def test_compiled_code_follows_the_tf32_switch(set_tf32, device):
    torch.compiler.reset()
    seen = []

    def backend(graph, _):
        calls = [node for node in graph.graph.nodes if "mlstm" in str(node.target)]
        seen.extend(node.kwargs["allow_tf32"] for node in calls)
        return graph.forward

    compiled = torch.compile(mlstm_chunkwise__xl_chunk, fullgraph=True, backend=backend)
    x = random_inputs(device, s=20)
    for on in (False, False, True, True, False):
        set_tf32(on)
        compiled(*x)
    assert seen == [False, True], "compiled once for each"


def test_tensors_that_are_not_aligned(device):
    """The same numbers, though perhaps by other kernels."""
    tokens, _ = operator_inputs(device, torch.bfloat16, dhqk=64, dhhv=64)
    q, *others = tokens
    shifted = torch.empty(q.numel() + 1, dtype=q.dtype, device=device)[1:].view_as(q).copy_(q)
    results = [OPS.forward(x, *others, None, None, None, None) for x in (q, shifted)]
    assert_close([results[0][0]], [results[1][0]], 4 * TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_portable_engine(dtype, device):
    tokens, initial = operator_inputs(device, dtype, dhqk=64, dhhv=128)
    results = [
        OPS.forward(*tokens, *initial, None, generic_engine=generic) for generic in (False, True)
    ]
    if device == "cpu":
        assert all(map(torch.equal, *results))
    else:
        assert_close([results[0][0]], [results[1][0]], 4 * TOLERANCE[dtype])


# ---- autocast ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_autocast_casts_data_but_not_gates(kernel_dtype, device):
    x = random_inputs(device, states=True, i_bias=-20.0)
    leaves = x.leaves()
    with torch.autocast(device, dtype=torch.bfloat16):
        h, (c, n, m) = mlstm_chunkwise__xl_chunk(
            *leaves, return_last_states=True, autocast_kernel_dtype=kernel_dtype
        )
    assert h.dtype == kernel_dtype
    assert c.dtype == n.dtype == m.dtype == torch.float32
    by_hand = x.replace(q=x.q.to(kernel_dtype), k=x.k.to(kernel_dtype), v=x.v.to(kernel_dtype))
    assert torch.equal(h, mlstm_chunkwise__xl_chunk(*by_hand)), "the gates were rounded"
    h.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)


def test_autocast_leaves_float64_alone(device):
    x = random_inputs(device, torch.float64)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert mlstm_chunkwise__xl_chunk(*x).dtype == torch.float64


def test_autocast_kernel_dtype_without_autocast(device):
    x = random_inputs(device)
    assert mlstm_chunkwise__xl_chunk(*x, autocast_kernel_dtype=torch.bfloat16).dtype == x.q.dtype


def test_autocast_of_mixed_dtypes(device):
    """What linear layers and norms hand over under autocast: some bfloat16, some float32."""
    x = random_inputs(device)
    mixed = x.replace(v=x.v.bfloat16(), i=x.i.bfloat16())
    tokens, initial = operator_inputs(device, states=True)
    tokens[0] = tokens[0].bfloat16()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert mlstm_chunkwise__xl_chunk(*mixed).dtype == torch.bfloat16
        assert OPS.forward(*tokens, *initial, None)[0].dtype == torch.bfloat16
        assert OPS.step(*tokens, *initial)[0].dtype == torch.bfloat16
        assert OPS.step_(*tokens, *initial).dtype == torch.bfloat16


# ---- errors -----------------------------------------------------------------------------------


def broken(**tensors):
    return lambda x: x.replace(
        **{name: change(getattr(x, name)) for name, change in tensors.items()}
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (broken(q=lambda t: t[0]), r"q\.rank: expected 4 \(b, nh, s, dhqk\), got 3"),
        (broken(q=lambda t: t[None]), r"q\.rank: expected"),
        (broken(k=lambda t: t[:, :, :5]), r"k\.shape: expected \[2, 2, 65, 16\]"),
        (broken(v=lambda t: t[:1]), r"v\.shape: expected"),
        (broken(v=lambda t: t[0, 0]), r"v\.rank: expected 4"),
        (broken(v=torch.Tensor.bfloat16), r"v\.dtype: expected float32, got bfloat16"),
        (broken(i=lambda t: t[..., None]), r"i\.rank: expected 3"),
        (broken(f=lambda t: t[:, :1]), r"f\.shape: expected"),
        (broken(q=torch.Tensor.int), r"problem\.dtype: expected float32, float64"),
        (broken(n=lambda t: None), "n_initial: expected all or none"),
        (broken(c=lambda t: None), "c_initial: expected all or none"),
        (broken(c=lambda t: t[:, :, :3]), r"c_initial\.shape: expected \[2, 2, 16, 24\]"),
        (broken(m=lambda t: t.expand(2, 2, 5)), r"m_initial\.rank: expected 2"),
        (broken(q=lambda t: t[..., :0], k=lambda t: t[..., :0]), r"problem\.dhqk: expected a size"),
    ],
)
def test_error_says_what_was_expected(change, message, device):
    x = change(random_inputs(device, states=True))
    with pytest.raises(RuntimeError, match=message):
        mlstm_chunkwise__xl_chunk(*x)
    with pytest.raises(RuntimeError, match=message):
        mlstm_chunkwise__xl_chunk(*x.map(lambda t: t.clone().requires_grad_(t.is_floating_point())))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"eps": -1.0}, r"problem\.eps: expected a finite number >= 0"),
        ({"eps": float("nan")}, r"problem\.eps"),
        ({"chunk_size": -1}, r"problem\.chunk_size"),
        ({"qk_scale": float("inf")}, r"problem\.qk_scale"),
        ({"dtype_state": torch.int32}, r"problem\.state_dtype"),
    ],
)
def test_bad_options(options, message, device):
    with pytest.raises(RuntimeError, match=message):
        mlstm_chunkwise__xl_chunk(*random_inputs(device), **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_on_two_devices():
    x = random_inputs("cuda")
    with pytest.raises(RuntimeError, match=r"v\.device: expected that of q"):
        mlstm_chunkwise__xl_chunk(*x.replace(v=x.v.cpu()))


def test_no_second_derivative(device):
    x = random_inputs(device, torch.float64).leaves()
    (gradient,) = torch.autograd.grad(mlstm_chunkwise__xl_chunk(*x).sum(), x.q, create_graph=True)
    with pytest.raises(RuntimeError, match="gradient of the gradient"):
        gradient.sum().backward()


def test_unknown_keyword(device):
    x = random_inputs(device)
    for name in get_available_mlstm_kernels():
        kernel = get_mlstm_kernel(name)
        kernel(*x, num_warps_intra=4, siz_b_L_loop=16, recompute_states_in_bw=True)
        with pytest.raises(TypeError, match="'chunksize'"):
            kernel(*x, chunksize=32)


# ---- threads and processes --------------------------------------------------------------------


def test_two_threads_at_once(device):
    """Each with its own problem, its own errors and its own gradients."""
    problems = [random_inputs(device, s=64 + 10 * index, states=True) for index in range(2)]

    def work(x):
        leaves = x.leaves()
        h = mlstm_chunkwise__xl_chunk(*leaves)
        h.backward(torch.ones_like(h))
        try:
            mlstm_chunkwise__xl_chunk(*x.replace(v=x.v[:, :, 1:]))
        except RuntimeError as raised:
            message = str(raised)
        return [h, *leaves.gradients()], message

    alone = [work(x) for x in problems]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            for (got, message), (wanted, expected) in zip(
                pool.map(work, problems), alone, strict=True
            ):
                assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
                assert message == expected and re.search(r"v\.shape", message)


FORKING = """
import torch
from torch.utils.data import DataLoader
from mlstm.torch.chunkwise import mlstm_chunkwise__xl_chunk

torch.manual_seed(0)
x = [torch.randn(2, 4, 256, 64) for _ in range(3)] + [torch.randn(2, 4, 256) for _ in range(2)]

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return mlstm_chunkwise__xl_chunk(*x)

if __name__ == "__main__":
    wanted = mlstm_chunkwise__xl_chunk(*x)  # starts the library's threads, which a fork loses
    loader = DataLoader(Data(), num_workers=2, multiprocessing_context="fork")
    assert all(torch.equal(batch[0], wanted) for batch in loader)
    assert torch.equal(mlstm_chunkwise__xl_chunk(*x), wanted)
    print("forked")
"""


def test_forked_workers():
    environment = os.environ | {"MLSTM_NUM_THREADS": "2"}
    result = subprocess.run(
        [sys.executable, "-c", FORKING],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.strip() == "forked", result.stderr


def test_inference_mode(device):
    with torch.inference_mode():
        x = random_inputs(device, s=3, states=True)
        h, _ = mlstm_chunkwise__xl_chunk(*x, return_last_states=True)
        pool = [x.c.clone(), x.n.clone(), x.m.clone()]
        stepped = mlstm_recurrent_step_slots(*list(x)[:5], *pool)
    wanted, last = recurrence(x)
    assert_close([h, stepped, *pool], [wanted, wanted, *last], TOLERANCE[torch.float32])
