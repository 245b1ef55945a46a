"""Baby Dragon Hatchling in MLX: Metal on Apple silicon, CUDA and CPU elsewhere.

>>> import mlx.core as mx
>>> from bdh_mlx import BDH, BDHConfig
>>> model = BDH(BDHConfig(n_layer=2, n_embd=8, mlp_internal_dim_multiplier=4))
>>> logits, loss = model(mx.array([[66, 68]]), mx.array([[68, 72]]))
>>> logits.shape
(1, 2, 256)

On chips with matrix units (CUDA, Apple's from M5 on) MLX rounds the factors of float32 products to TF32, which is a thousand
times coarser, unless MLX_ENABLE_TF32=0 is in the environment before the first product. Importing this package does not set
it; making a ``bdh_mlx.backend.MLXBackend`` does.
"""

from bdh_mlx.model import BDH
from bdh_spec import BDHConfig

__all__ = ["BDH", "BDHConfig"]
