"""One training loop for every port of Baby Dragon Hatchling.

>>> from bdh_train import TrainConfig, train
>>> TrainConfig(data=("book.txt",), size="hatchling").max_steps
1000
"""

from bdh_train.config import TrainConfig, TrainError
from bdh_train.loop import Result, train

__all__ = ["Result", "TrainConfig", "TrainError", "train"]
