"""BDHForCausalLM behind the protocol, asked as its users ask it, so that the conformance suite can judge it."""

import copy
from dataclasses import replace

import torch
import transformers

from bdh_spec import Backend, Capabilities, Model, Params
from bdh_torch.backend import batch_first, from_numpy, full_precision, to_numpy
from bdh_transformers import BDHCache, BDHConfig, BDHForCausalLM

NAMES = Params("backbone.embed.weight", "backbone.encoder", "backbone.encoder_v", "backbone.decoder", "lm_head.weight")


class TransformersModel(Model):
    """A model in evaluation, in one form of attention."""

    form = "bdh_recurrent"

    def __init__(self, params, config, *, device, dtype, phase):
        super().__init__(config, device=device, dtype=dtype, phase=phase)
        self.module = (
            BDHForCausalLM(BDHConfig.from_sizes(config, attn_implementation=self.form)).to(getattr(torch, dtype)).eval()
        )
        weights = params._replace(lm_head=params.lm_head.T)
        self.module.load_state_dict({name: from_numpy(w, device, dtype) for name, w in zip(NAMES, weights, strict=True)})

    def params(self):
        return self._transposed(Params(*(to_numpy(self.module.get_parameter(name)) for name in NAMES)))

    @full_precision()
    @torch.no_grad()
    def _forward(self, tokens):
        return to_numpy(self.module(torch.tensor(tokens), use_cache=False).logits)

    @full_precision()
    @torch.no_grad()
    def _forward_padded(self, tokens, lengths):
        mask = torch.arange(tokens.shape[1]) >= tokens.shape[1] - torch.tensor(lengths)[:, None]
        return to_numpy(self.module(torch.tensor(tokens), attention_mask=mask.long()).logits)

    def _init_state(self, batch):
        return BDHCache(self.module.config)

    @full_precision()
    @torch.no_grad()
    def _advance(self, native, position, tokens, donate):
        cache = native if donate else copy.deepcopy(native)
        position_ids = position + torch.arange(tokens.shape[1])[None]
        out = self.module(torch.tensor(tokens), past_key_values=cache, position_ids=position_ids, use_cache=True)
        return to_numpy(out.logits), out.past_key_values

    @full_precision()
    @torch.no_grad()
    def _loss(self, tokens, targets):
        return float(self._scored(tokens, targets).loss)

    @full_precision()
    def _gradients(self, tokens, targets):
        loss = self._scored(tokens, targets).loss
        slopes = torch.autograd.grad(loss, [self.module.get_parameter(name) for name in NAMES])
        return loss.item(), self._transposed(Params(*map(to_numpy, slopes)))

    def _scored(self, tokens, targets):
        shifted = torch.tensor(targets)  # transformers shifts labels itself unless it is given these
        return self.module(torch.tensor(tokens), labels=shifted, shift_labels=shifted)

    @staticmethod
    def _transposed(params):
        return params._replace(lm_head=params.lm_head.T.copy())


class RecurrentModel(TransformersModel):
    """The form with a state, which moves between this and other ports."""

    def _export_state(self, native):
        nh = self.config.n_head
        return tuple(to_numpy(batch_first(layer.state, nh, len(layer.state) // nh)) for layer in native.layers)

    def _import_state(self, state):
        cache = BDHCache(self.module.config)
        dtype = "float64" if self.dtype == "float64" else "float32"
        for layer, memory in zip(cache.layers, state.layers, strict=True):
            layer.state = from_numpy(memory.swapaxes(0, 1), "cpu", dtype).flatten(0, 1)
            layer.length = state.position
        return cache

    def _init_state(self, batch):
        cache, c = BDHCache(self.module.config), self.config
        for layer in cache.layers:
            dtype = torch.promote_types(self.module.dtype, torch.float32)
            layer.state = torch.zeros(batch * c.n_head, c.n_neurons, c.n_embd, dtype=dtype)
        return cache


class ParallelModel(TransformersModel):
    """The form with rows."""

    form = "bdh_parallel"


class RecurrentBackend(Backend):
    """bdh_recurrent, as a port."""

    name, model = "bdh_recurrent", RecurrentModel
    capabilities = Capabilities(
        dtypes=("float32", "bfloat16", "float16"),
        phases=("exact",),
        verbs=("forward", "padded", "advance", "state", "loss", "gradients"),
    )

    def version(self):
        return f"transformers {transformers.__version__}"

    def devices(self):
        return ("cpu",)

    def _load(self, params, config, *, device, dtype, phase):
        return self.model(params, config, device=device, dtype=dtype, phase=phase)


class ParallelBackend(RecurrentBackend):
    """bdh_parallel, as a port: rows move nowhere."""

    name, model = "bdh_parallel", ParallelModel
    capabilities = replace(RecurrentBackend.capabilities, verbs=("forward", "padded", "advance", "loss", "gradients"))


class RecurrentInFloat64(RecurrentBackend):
    """In float64 transformers rounds logits to float32 before it takes the loss, so that is not claimed."""

    capabilities = Capabilities(("float64",), ("exact",), ("forward", "padded", "advance", "state"))


class ParallelInFloat64(ParallelBackend):
    """The same for the other form."""

    capabilities = Capabilities(("float64",), ("exact",), ("forward", "padded", "advance"))
