"""Our language models for Hugging Face's transformers: saved and loaded in its layout, run by its `generate`.

Needs the extra `hf` (`pip install 'dn-lib[hf]'`). Importing this module registers the two classes, so that `AutoConfig`
and `AutoModelForCausalLM` know `model_type` "dn_lib" and programs that load models through them (lm-eval's `hf`
model, a `Trainer`) take a folder of `save_pretrained`. Both layouts are `config.json` and `model.safetensors`, and each
side reads the other's: `DnLibForCausalLM.from_pretrained` a folder of `dn_lib.models.save_model`, and
`dn_lib.models.load_model` a folder of `save_pretrained`, as long as it is one file of weights.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from transformers import (  # pyright: ignore[reportMissingImports] (an extra)
        AutoConfig,
        AutoModelForCausalLM,
        GenerationMixin,
        PretrainedConfig,
        PreTrainedModel,
    )
    from transformers.utils.generic import ModelOutput  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError("dn_lib.models.hf needs transformers 5: pip install 'dn-lib[hf]'") from error

from dn_lib.forms.common import describe
from dn_lib.models.cache import Cache
from dn_lib.models.config import ModelConfig
from dn_lib.models.files import MODEL_TYPE, unwrapped
from dn_lib.models.language_model import LanguageModel


class DnLibConfig(PretrainedConfig):
    """The fields of `ModelConfig`, beside those that every configuration of transformers has.

    >>> DnLibConfig(width=64, layers=2).to_model_config().width
    64
    """

    model_type = MODEL_TYPE
    attribute_map = {  # noqa: RUF012 (as transformers declares it)
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
    }

    def __init__(self, **options: Any):
        own = {field.name: options.pop(field.name, field.default) for field in dataclasses.fields(ModelConfig)}
        for name, value in ModelConfig.from_dict(own).to_dict().items():
            setattr(self, name, value)
        # One matrix is the embedding and the head, where `tie_embeddings` is set: transformers has nothing to tie.
        options["tie_word_embeddings"] = False
        super().__init__(**options)

    def to_model_config(self) -> ModelConfig:
        """The configuration without what transformers adds."""
        return ModelConfig.from_dict({f.name: getattr(self, f.name) for f in dataclasses.fields(ModelConfig)})


@dataclass
class CausalOutput(ModelOutput):
    """Logits `[B, L, vocab_size]`; the loss, if labels were given; the state to go on from, if it was asked for."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: Cache | None = None


class DnLibForCausalLM(PreTrainedModel, GenerationMixin):
    """A `LanguageModel`, kept as `model`, with the methods that transformers calls.

    `generate` keeps a `Cache` between tokens, of a size that does not grow with the text (but for layers of attention).
    Beam search and assisted generation are refused by transformers, since such a state cannot be taken back.

    >>> model = DnLibForCausalLM(DnLibConfig(width=32, layers=1, heads=1))
    >>> model.generate(torch.zeros(1, 3, dtype=torch.long), max_new_tokens=4, do_sample=False, pad_token_id=0).shape
    torch.Size([1, 7])
    """

    config_class = DnLibConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _is_stateful = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (as transformers declares it)

    def __init__(self, config: DnLibConfig):
        super().__init__(config)
        self.model = LanguageModel(config.to_model_config())
        self.post_init()

    @classmethod
    def wrap(cls, model: nn.Module) -> DnLibForCausalLM:
        """`model`, a `LanguageModel` (compiled, wrapped for several devices, or bare), itself and not a copy.

        >>> inside = LanguageModel(ModelConfig(width=32, layers=1, heads=1))
        >>> DnLibForCausalLM.wrap(inside).model is inside
        True
        """
        inside = unwrapped(model)
        with torch.device("meta"):
            wrapper = cls(DnLibConfig(**inside.config.to_dict()))
        wrapper.model = inside
        wrapper.config.dtype = next(inside.parameters()).dtype
        return wrapper.train(inside.training)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: a `LanguageModel` draws its own weights, and those of a folder are whole."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.head

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise NotImplementedError("the vocabulary of a dn_lib model is fixed: make another model")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the state is made by `forward`

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        state: Cache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = True,
        **ignored: Any,
    ) -> dict[str, Any]:
        """What `forward` is given for the next token: the last token alone, once there is a state."""
        if state is not None:
            return {"input_ids": input_ids[:, -1:], "state": state, "use_cache": True}
        return {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": use_cache}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *rest: Any, **options: Any
    ):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *rest, **options)
        if outputs.get("state") is not None:
            model_kwargs["state"] = outputs["state"]
        return model_kwargs

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = True,
        **options: Any,
    ) -> CausalOutput | tuple:
        """Tokens `[B, L]` -> `CausalOutput`.

        attention_mask: `[B, L]`, 0 for padding, on whichever side. Such tokens are left out, and the others seen as if
        their row stood alone; the logits of padding are 0. It is for prompts: with `state` no token may be padding.
        state: from an earlier output; it is updated. labels: `[B, L]`, -100 for what is not counted, moved by one
        here. logits_to_keep: only those of the last so many tokens, 0 for all.
        """
        if state is None and use_cache:
            state = self.model.new_cache(input_ids.shape[0])
        features = self._features(input_ids, attention_mask, state)
        logits = self.model.logits(features[:, -logits_to_keep:] if logits_to_keep else features)
        loss = None
        if labels is not None:
            if logits_to_keep:
                raise ValueError(f"labels want all logits, got logits_to_keep = {describe(logits_to_keep)}")
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        output = CausalOutput(loss=loss, logits=logits, state=state)
        return output if return_dict or return_dict is None else output.to_tuple()

    def _features(self, tokens: Tensor, mask: Tensor | None, state: Cache | None) -> Tensor:
        """`[B, L, width]`: without padding as they are, with padding packed into one row and spread out again."""
        if mask is not None and (mask.dim() != 2 or mask.shape[0] != tokens.shape[0]):
            raise ValueError(f"attention_mask must be [B, L] = {list(tokens.shape)}, got {list(mask.shape)}")
        kept = None if mask is None else mask[:, -tokens.shape[1] :] != 0
        if kept is None or bool(kept.all()):
            return self.model.features(tokens, state)
        cu_seqlens = F.pad(kept.sum(1).cumsum(0), (1, 0))
        packed = self.model.features(tokens[kept][None], state, cu_seqlens=cu_seqlens)[0]
        return packed.new_zeros(*tokens.shape, packed.shape[-1]).index_put((kept,), packed)


AutoConfig.register(MODEL_TYPE, DnLibConfig, exist_ok=True)
AutoModelForCausalLM.register(DnLibConfig, DnLibForCausalLM, exist_ok=True)
