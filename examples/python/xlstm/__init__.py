# SPDX-License-Identifier: MIT OR Apache-2.0
"""A small xLSTM language model built on `mlstm.torch`.

Read in this order:
`model.py`      the network
`data.py`       text to tensors
`train.py`      the training loop and the held-out measure
`generate.py`   prefill, then one byte at a time
`agreement.py`  chunkwise, parallel and step give the same numbers
"""

from .model import XLSTM, XLSTMConfig

__all__ = ["XLSTM", "XLSTMConfig"]
