"""A text by ``generate`` of transformers beside one by bdh_torch's own: what the face costs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bdh_bench.rows import NEW
from bdh_bench.sides import OURS, Runner, Task
from bdh_spec import BDHConfig
from bdh_spec.params import Params
from bdh_torch.backend import TorchBackend, TorchModel
from bdh_transformers import BDHConfig as Sizes
from bdh_transformers import BDHForCausalLM


def runner(task: Task, params: Params) -> Runner:
    """Greedy texts of NEW tokens after one: by transformers as ours, by bdh_torch as what they are measured against."""
    start = torch.zeros(1, 1, dtype=torch.long, device=task.device)
    loaded = TorchBackend().load(params, task.config, device=task.device, dtype=task.dtype)
    assert isinstance(loaded, TorchModel)
    module = loaded.module

    def by_torch() -> Tensor:
        return module.generate(start, NEW, temperature=0)

    def by_transformers() -> Tensor:
        text: Tensor = theirs.generate(start, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        return text

    if task.side == OURS:
        theirs = faced(task.config, module.state_dict())
    run = by_transformers if task.side == OURS else by_torch
    return Runner(run, lambda: {"text": np.asarray(run().cpu())})


def faced(config: BDHConfig, state: dict[str, Tensor]) -> BDHForCausalLM:
    """The same weights behind the interface of transformers."""
    model = BDHForCausalLM(Sizes.from_sizes(config))
    body = {f"backbone.{name}": weight for name, weight in state.items() if name not in ("lm_head", "attn.freqs")}
    model.load_state_dict({**body, "lm_head.weight": state["lm_head"].T.contiguous()})
    return model.to(state["lm_head"].device, state["lm_head"].dtype).eval()
