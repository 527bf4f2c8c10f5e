# SPDX-License-Identifier: MIT OR Apache-2.0
"""mLSTMBackend in its modes, and in a model that trains."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import STATES, inputs
from flax import nnx

from mlstm.jax import get_mlstm_kernel
from mlstm.jax.backend_module import mLSTMBackend, mLSTMBackendConfig

KERNELS = ["chunkwise--xl_chunk", "chunkwise--limit_chunk", "parallel--limit_headdim"]
SIGING = "chunkwise--xl_chunk_siging"

close = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9))


def backend(**config):
    return mLSTMBackend(mLSTMBackendConfig(**config))


def expected(tensors, **options):
    """h and states, m (R, NH, 1), in float64."""
    name = SIGING if "normalize" in options else KERNELS[0]
    h, (c, n, *m) = get_mlstm_kernel(name)(**tensors, return_last_states=True, **options)
    return h, (c, n, *(x[..., None] for x in m))


@pytest.mark.parametrize("mode", ["train", "train_with_padding"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_training(kernel, mode, rng):
    x = inputs(rng, "float64", s=77, states=True)
    h, states = expected(x)
    close(backend(chunkwise_kernel=kernel, mode=mode)(**x), (h, states))
    module = backend(chunkwise_kernel=kernel, mode=mode, return_last_states=False)
    close(module(**x), h)
    close(module(**x, return_last_states=True), (h, states))


@pytest.mark.parametrize("config", [dict(chunkwise_kernel=k) for k in KERNELS], ids=KERNELS)
def test_inference(config, rng):
    """A prompt of any length, then token by token, is one long sequence."""
    x = inputs(rng, "float64", s=45)
    module = nnx.jit(backend(mode="inference", return_last_states=False, **config))
    rows, states = [], {}
    for start, stop in [(0, 0), (0, 1), (1, 38), (38, 39), (39, 40), (40, 44), (44, 45)]:
        part = {name: a[:, :, start:stop] for name, a in x.items()}
        h, states = module(**part, **states)
        states = dict(zip(STATES, states, strict=True))
        rows.append(h)
    close((jnp.concatenate(rows, 2), tuple(states.values())), expected(x))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("s", [1, 20])
def test_siging(s, normalize, rng):
    x = inputs(rng, "float64", s=s, states=True)
    wanted = expected({k: a for k, a in x.items() if k != "m_initial"}, normalize=normalize)
    for mode in ("train", "inference"):
        module = backend(chunkwise_kernel=SIGING, normalize_siging=normalize, mode=mode)
        close(module(**x), wanted)


@pytest.mark.parametrize("s", [1, 5])
def test_dtypes(s, device, rng):
    x = inputs(rng, s=s, states=True)
    config = dict(autocast_kernel_dtype="float16", inference_state_dtype="bfloat16")
    h, (c, n, m) = backend(mode="inference", **config)(**x)
    assert (h.dtype, c.dtype, n.dtype, m.dtype) == ("float16", "bfloat16", "float32", "float32")


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("s", [1, 30])
def test_gradients(mode, s, rng):
    x = inputs(rng, "float64", s=s, states=True)

    def total(run):
        return jax.grad(lambda x: sum((a**2).sum() for a in jax.tree.leaves(run(x))))(x)

    close(total(lambda x: backend(mode=mode)(**x)), total(lambda x: expected(x)))


def test_mode_can_be_overridden(rng):
    x = inputs(rng, s=5)
    module = backend(mode="train", return_last_states=False)
    assert module(**x).shape == (2, 2, 5, 24)
    assert len(module(**x, mode="inference")[1]) == 3


def test_packed(rng):
    x = inputs(rng, "float64", b=1, s=30)
    h, _ = backend(mode="inference")(**x, cu_seqlens=jnp.array([0, 12, 30]))
    parts = [
        expected({k: a[:, :, cut] for k, a in x.items()})[0] for cut in (slice(12), slice(12, 30))
    ]
    close(h, jnp.concatenate(parts, 2))


def test_configuration(rng):
    peers = mLSTMBackendConfig(
        chunkwise_kernel="chunkwise--triton_xl_chunk",
        sequence_kernel="native_sequence__triton",
        step_kernel="triton",
    )
    assert "triton_xl_chunk" in str(mLSTMBackend(peers))
    with pytest.raises(ValueError, match="mode 'eval' is unknown"):
        mLSTMBackendConfig(mode="eval")
    with pytest.raises(ValueError, match="mode"):
        backend()(**inputs(rng, s=3), mode="eval")
    for field in ("chunkwise_kernel", "sequence_kernel", "step_kernel"):
        with pytest.raises(ValueError, match="'none' is unknown"):
            backend(**{field: "none"})


class Reader(nnx.Module):
    """Tokens to logits through one backend."""

    def __init__(self, vocabulary, heads, width, rngs):
        self.heads = heads
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.projections = nnx.Linear(width, 3 * width, rngs=rngs)
        self.gates = nnx.Linear(width, 2 * heads, rngs=rngs)
        self.backend = backend(return_last_states=False, chunk_size=16)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        b, s, _ = x.shape
        heads = self.projections(x).reshape(b, s, 3, self.heads, -1)
        q, k, v = heads.transpose(2, 0, 3, 1, 4)
        i, f = self.gates(x).reshape(b, s, 2, self.heads).transpose(2, 0, 3, 1)
        h = self.backend(q, k, v, i, f + 3)
        return self.head(h.transpose(0, 2, 1, 3).reshape(b, s, -1))


def test_a_model_learns_to_recall(device, rng):
    """The second half of each sequence repeats the first."""
    half = jnp.asarray(rng.integers(0, 16, (64, 12)))
    tokens = jnp.concatenate([half, half], 1)
    model = Reader(16, 2, 32, nnx.Rngs(int(rng.integers(2**31))))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        def loss(model):
            logits = model(tokens[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return losses[:, 12:].mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(train_step(model, optimizer)) for _ in range(200)]
    assert losses[0] > 2.5 and losses[-1] < 0.7 * losses[0], losses
