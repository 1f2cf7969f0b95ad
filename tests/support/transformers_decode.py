"""Models of transformers on a GPU, and a greedy decode of them, a step at a time."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch
import transformers_models

PROMPTS = [[5, 9, 17, 33, 65], [1, 2, 3, 4, 5]]


def made(name: str, implementation: str = "nvfp4_moe") -> Any:
    import transformers

    model = transformers_models.model(transformers, name).to("cuda")
    model.set_experts_implementation(implementation)
    return model


def prompts() -> torch.Tensor:
    return torch.tensor(PROMPTS, device="cuda")


class Decode:
    """Greedy decoding with a static cache, a step at a time."""

    def __init__(self, model: Any):
        import transformers

        self.model = model
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=64)
        logits = model(prompts(), past_key_values=self.cache, use_cache=True).logits
        self.token = logits[:, -1].argmax(-1, keepdim=True)

    def step(self) -> torch.Tensor:
        """Write the next token over the last, and return its logits [B, vocabulary]."""
        logits = self.model(
            self.token, attention_mask=self.mask(), past_key_values=self.cache, use_cache=True
        ).logits[:, -1]
        self.token.copy_(logits.argmax(-1, keepdim=True))
        return logits

    def mask(self) -> torch.Tensor | None:
        """Return the mask [B, 1, 1, 64] that is added to the scores of eager attention.

        None leaves the mask to transformers. Its own for eager attention, which GPT-OSS alone has here,
        copies a zero from the CPU (5.17, `masking_utils.py`, `eager_mask`); no graph captures that.
        """
        if self.model.config._attn_implementation != "eager":
            return None
        device = self.token.device
        later = torch.arange(64, device=device) > self.cache.get_seq_length()
        mask = torch.zeros(len(self.token), 1, 1, 64, dtype=torch.bfloat16, device=device)
        return mask.masked_fill(later, torch.finfo(mask.dtype).min)


def state(decode: Decode) -> list[torch.Tensor]:
    """Every tensor that a step changes."""
    layers = [
        t
        for layer in decode.cache.layers
        for t in vars(layer).values()
        if isinstance(t, torch.Tensor)
    ]
    return [decode.token, *layers]
