"""Calls of `nvfp4_quantize` that no backend accepts, and what each is told."""

# SPDX-License-Identifier: Apache-2.0
import torch

from nvfp4_moe import NVFP44Over6Config
from nvfp4_moe.cases import inputs

G = 1 / 2688
FOUR = NVFP44Over6Config()
FOUR_256 = NVFP44Over6Config(256, "MSE", True)
X = inputs.synthetic("heavy", 128, 192)
INDEX = torch.arange(128, dtype=torch.int32)
TOKEN = {"per_token_activation": True}
INVALID = {
    "a list": ({"a": [1.0]}, TypeError, "a is a list of 1; it must be a tensor"),
    "1-D": ({"a": X[0]}, ValueError, r"a is bfloat16 \[192\]; it must be a tensor \[M, K\]"),
    "3-D": ({"a": X[None]}, ValueError, r"a is bfloat16 \[1, 128, 192\]"),
    "K 24": ({"a": X[:, :24]}, ValueError, "K = 24; K must be a positive multiple of 16"),
    "K 0": ({"a": X[:, :0]}, ValueError, "K = 0"),
    "int dtype": (
        {"a": X.int()},
        ValueError,
        r"a is int32 .*; per token it must be float16, bfloat16 or",
    ),
    "fp64": ({"a": X.double()}, ValueError, "a is float64 .*it must be"),
    "e5m2": ({"a": X.to(torch.float8_e5m2)}, ValueError, "a is float8_e5m2"),
    "e4m3 per token": (
        {"a": X.to(torch.float8_e4m3fn)},
        ValueError,
        "e4m3fn .*; per token it must",
    ),
    "e4m3 4over6": (
        {
            "a": X.to(torch.float8_e4m3fn),
            "a_global_sf": 1.0,
            "per_token_activation": False,
            "nvfp4_4over6": FOUR,
        },
        ValueError,
        "e4m3fn .* 4over6 it must be float16 or bfloat16",
    ),
    "fp32 global": (
        {"a": X.float(), "per_token_activation": False},
        ValueError,
        "float32 .*; with a global scale it must be",
    ),
    "fp32 exact": (
        {"a": X.float(), "fast_math": False},
        ValueError,
        "with exact-cuda it must be float16",
    ),
    "fp32 4over6": (
        {"a": X.float(), "nvfp4_4over6": FOUR},
        ValueError,
        "per token and 4over6 it must be float16 or bfloat16",
    ),
    "fp32 cute-dsl": (
        {"a": X.float(), "build": "cute-dsl"},
        ValueError,
        "with fast-cute-dsl it must be float16",
    ),
    "vector 32": ({"sf_vec_size": 32}, ValueError, "sf_vec_size is 32; it must be 16"),
    "layout 3": ({"sfLayout": 3}, ValueError, "sfLayout is 3; it must be one of layout_128x4, "),
    "layout name": ({"sfLayout": "128x4"}, ValueError, "sfLayout is '128x4'"),
    "no scale": ({"a_global_sf": None}, TypeError, "a_global_sf is None; it must be a positive"),
    "two scales": (
        {"a_global_sf": torch.ones(2)},
        ValueError,
        r"float32 \[2\]; it must be .* of one element, or a number",
    ),
    "rows per token": (
        {"a_global_sf": torch.ones(128)},
        ValueError,
        r"float32 \[128\]; it must be .* of one element, or a number",
    ),
    "127 rows": (
        {"a_global_sf": torch.ones(127), "per_token_activation": False},
        ValueError,
        r"float32 \[127\]; it must be .* one element, or one a row \(128\)",
    ),
    "scales elsewhere": (
        {"a_global_sf": torch.ones(128, device="meta"), "per_token_activation": False},
        ValueError,
        "a_global_sf is on meta; it must be on a's device, cpu",
    ),
    "scale of 448 for 256": (
        {"nvfp4_4over6": FOUR_256},
        ValueError,
        r"a_global_sf is 0.00037.*with e4m3_max 256 it must be 1 / \(6 \* 256\)",
    ),
    "scale 1 for off": ({"a_global_sf": 1.0, "nvfp4_4over6": None}, ValueError, "e4m3_max 448"),
    "scale tensor for off": (
        {"a_global_sf": torch.full((1,), G * 1.002), "nvfp4_4over6": None},
        ValueError,
        "e4m3_max 448",
    ),
    "index, global": (
        {"expanded_idx_to_permuted_idx": INDEX, "per_token_activation": False},
        ValueError,
        "permuted_idx is .*without per_token_activation=True it must be None",
    ),
    "index list": ({"expanded_idx_to_permuted_idx": [0] * 128}, TypeError, "idx is a list"),
    "index int64": (
        {"expanded_idx_to_permuted_idx": INDEX.long()},
        ValueError,
        "must be a tensor of int32",
    ),
    "index 2-D": (
        {"expanded_idx_to_permuted_idx": INDEX[:, None]},
        ValueError,
        r"int32 \[128, 1\]; it must be",
    ),
    "index short": (
        {"expanded_idx_to_permuted_idx": INDEX[1:]},
        ValueError,
        r"int32 \[127\]; .* at least M = 128",
    ),
    "index elsewhere": (
        {"expanded_idx_to_permuted_idx": INDEX.to("meta")},
        ValueError,
        "expanded_idx_to_permuted_idx is on meta; it must be on a's device",
    ),
    "out_scale, global": (
        {"out_scale": torch.ones(1), "per_token_activation": False},
        ValueError,
        "out_scale is .*without per_token_activation=True it must be None",
    ),
    "out_scale float": ({"out_scale": 0.5}, TypeError, "out_scale is 0.5; it must be a tensor"),
    "out_scale 2": ({"out_scale": torch.ones(2)}, ValueError, r"out_scale is float32 \[2\]"),
    "out_scale elsewhere": (
        {"out_scale": torch.ones(1, device="meta")},
        ValueError,
        "out_scale is on meta",
    ),
    "shuffle 8x4": ({"do_shuffle": True, "sfLayout": 1}, ValueError, "it must be layout_128x4"),
    "shuffle linear": ({"do_shuffle": True, "sfLayout": 2}, ValueError, "it must be layout_128x4"),
    "shuffle M": (
        {"do_shuffle": True, "a": X[:96]},
        ValueError,
        "M must be a multiple of 128 and K of 64",
    ),
    "shuffle K": (
        {"do_shuffle": True, "a": X[:, :112]},
        ValueError,
        "M must be a multiple of 128 and K of 64",
    ),
    "4over6 type": ({"nvfp4_4over6": True}, TypeError, "nvfp4_4over6 is True; it must be an NVFP4"),
    "build": ({"build": "cake"}, ValueError, "build is 'cake'; it must be one of cuda, cute-dsl"),
}
