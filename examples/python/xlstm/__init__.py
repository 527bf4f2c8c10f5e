# SPDX-License-Identifier: MIT OR Apache-2.0
"""A small xLSTM language model, built on `mlstm.torch` and once more on `mlstm.jax`.

Read in this order:
`config.py`     sizes
`model.py`      the network in PyTorch; `flax_model.py` in JAX
`data.py`       text to arrays
`training.py`   the loop and the held-out measure; `train.py` and `flax_train.py` the step
`generate.py`   prefill, then one byte at a time; `flax_generate.py`
`agreement.py`  chunkwise, parallel and step give the same numbers; `flax_generate.py`
"""

from .config import TrainConfig, XLSTMConfig

__all__ = ["TrainConfig", "XLSTMConfig"]
