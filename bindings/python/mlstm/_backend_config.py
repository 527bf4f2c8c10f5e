# SPDX-License-Identifier: MIT OR Apache-2.0
"""The configuration that the backend modules of all packages share."""

from dataclasses import dataclass

_MODES = ("train", "train_with_padding", "inference")


@dataclass
class mLSTMBackendConfig:  # noqa: N801, the name in `mlstm_kernels`
    """Configuration of `mLSTMBackend`."""

    chunkwise_kernel: str = "chunkwise--xl_chunk"
    """Kernel for sequences, one of `get_available_mlstm_kernels()`."""
    sequence_kernel: str = "recurrent_sequence"
    """Accepted and checked; not needed, since every kernel takes every length."""
    step_kernel: str = "step"
    """Kernel for single tokens in inference."""
    mode: str = "train"
    """"train"; "train_with_padding", the same here, since no length needs padding; "inference"."""
    chunk_size: int = 64
    """Tokens per chunk, a hint."""
    return_last_states: bool = True
    """Whether training returns the last states; inference always does."""
    autocast_kernel_dtype: str = "bfloat16"
    """dtype that q, k, v take where autocast is enabled."""
    eps: float = 1e-6
    """Added to the denominator."""
    inference_state_dtype: str = "float32"
    """dtype of the c state in inference."""
    normalize_siging: bool = True
    """`normalize` of the kernels with the sigmoid input gate."""

    def __post_init__(self):
        """Raises ValueError for a mode that does not exist."""
        self.inference(self.mode)

    @property
    def siging(self) -> bool:
        """Whether the kernel has the sigmoid input gate."""
        return "siging" in self.chunkwise_kernel

    def inference(self, mode: str | None) -> bool:
        """Whether `mode`, or the configured one, is inference; ValueError if it does not exist."""
        mode = mode or self.mode
        if mode not in _MODES:
            raise ValueError(f"mode {mode!r} is unknown; there are {', '.join(_MODES)}")
        return mode == "inference"
