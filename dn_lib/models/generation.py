"""Text from a model: greedy or drawn, from prompts of one length or several."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dn_lib.forms.common import check_is_tensor, describe, is_integer, is_number
from dn_lib.models.cache import Cache
from dn_lib.models.language_model import LanguageModel, check_in_vocabulary

LONGEST = 2**31 - 1  # tokens of one generated sequence


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: Tensor,
    new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    lengths: Tensor | list[int] | None = None,
) -> Tensor:
    """Continue `prompt` `[B, L]`, L >= 1, by `new_tokens`: returns `[B, L + new_tokens]`.

    The prompt goes through the model once, then each new token alone, through one cache. Prompts of different
    lengths are padded on the left, with whatever tokens: the last `lengths[b]` of row b are its prompt. temperature 0
    takes the most likely token; `top_k` draws among the k most likely. `generator` (on the model's device) makes
    the draw repeatable. Raises ValueError for arguments out of range.

        >>> from dn_lib.models import ModelConfig
        >>> model = LanguageModel(ModelConfig(width=32, layers=1, heads=1))
        >>> a, b = (generate(model, torch.zeros(1, 1, dtype=torch.long), 8, temperature=0) for _ in range(2))
        >>> torch.equal(a, b)
        True
        >>> padded = torch.tensor([[0, 0, 5], [7, 8, 9]])
        >>> both = generate(model, padded, 8, temperature=0, lengths=[1, 3])
        >>> torch.equal(both[:1, 2:], generate(model, torch.tensor([[5]]), 8, temperature=0))
        True
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "new_cache"):
        raise TypeError(f"model must be a LanguageModel, compiled or not, got {describe(model)}")
    if not isinstance(prompt, Tensor):
        raise TypeError(f"prompt must be a tensor of tokens [B, L], got {type(prompt).__name__}")
    if prompt.dim() != 2 or prompt.numel() == 0:
        raise ValueError(f"prompt must be [B, L] with B and L at least 1, got shape {tuple(prompt.shape)}")
    check_is_tensor("prompt", prompt, "of tokens [B, L]")
    if prompt.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"prompt must be int32 or int64, got {prompt.dtype}")
    lengths = _prompt_lengths(prompt, lengths)
    read = prompt if lengths is None else prompt[_is_prompt(prompt, lengths)]  # padding may be any number
    check_in_vocabulary("prompt", read, model.config.vocab_size)
    if not is_integer(new_tokens):
        raise TypeError(f"new_tokens must be a whole number of 0 or more, got {describe(new_tokens)}")
    if new_tokens < 0:
        raise ValueError(f"new_tokens must be 0 or more, got {new_tokens}")
    if new_tokens > (most := LONGEST - prompt.shape[1]):
        raise ValueError(f"new_tokens must be at most {most} after this prompt, got {describe(new_tokens)}")
    if not is_number(temperature):
        raise TypeError(f"temperature must be a number, 0 (greedy) or more, got {describe(temperature)}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if top_k is not None and not is_integer(top_k):
        raise TypeError(f"top_k must be a whole number of at least 1 or None, got {describe(top_k)}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    cache, tokens = model.new_cache(prompt.shape[0]), [prompt]
    for step in range(new_tokens):
        last = _read_prompt(model, prompt, lengths, cache) if step == 0 else model.features(tokens[-1], cache)[:, -1]
        tokens.append(_sample(model.logits(last).float(), temperature, top_k, generator))
    return torch.cat(tokens, dim=1)


def _prompt_lengths(prompt: Tensor, lengths: Tensor | list[int] | None) -> Tensor | None:
    """`lengths` as a tensor on the prompt's device; raises ValueError unless it is `[B]`, from 1 to L."""
    if lengths is None:
        return None
    try:
        lengths = torch.as_tensor(lengths, device=prompt.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"lengths must be a tensor or a list of whole numbers, got {lengths!r}") from error
    if lengths.shape != prompt.shape[:1] or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(
            f"lengths must be {prompt.shape[0]} whole numbers, one a prompt, got {lengths.dtype} {list(lengths.shape)}"
        )
    if not 1 <= lengths.min() <= lengths.max() <= prompt.shape[1]:
        raise ValueError(f"lengths must be from 1 to L = {prompt.shape[1]}, got {lengths.tolist()}")
    return lengths.long()


def _is_prompt(prompt: Tensor, lengths: Tensor) -> Tensor:
    """Which tokens of `[B, L]` are not padding."""
    return torch.arange(prompt.shape[1], device=prompt.device) >= prompt.shape[1] - lengths[:, None]


def _read_prompt(model: LanguageModel, prompt: Tensor, lengths: Tensor | None, cache: Cache) -> Tensor:
    """The features of each prompt's last token, `[B, width]`. Prompts of different lengths are packed into one row."""
    if lengths is None:
        return model.features(prompt, cache)[:, -1]
    packed = prompt[_is_prompt(prompt, lengths)][None]
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    return model.features(packed, cache, cu_seqlens=cu_seqlens)[0, cu_seqlens[1:] - 1]


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator) -> Tensor:
    """`[B, vocab]` -> `[B, 1]`."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        # By place, not by value: of equal logits, which are common in bfloat16, no more than top_k are left.
        values, places = logits.topk(min(top_k, logits.shape[-1]))
        logits = torch.full_like(logits, float("-inf")).scatter(-1, places, values)
    # The largest logit is taken off first, so that a very small temperature cannot make inf - inf; and one that
    # is 0 in the precision of the logits would make 0 / 0.
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
