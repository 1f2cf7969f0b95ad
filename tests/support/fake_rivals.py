"""Fakes of the functions of humming-kernels and quack-kernels that the benchmark calls, in plain torch.

They compute what the libraries' GEMMs compute, on the CPU, and check the arguments that only a GPU would
check. `SIGNATURES` has each function with its name in the library, so that a test can compare both.
"""

# SPDX-License-Identifier: Apache-2.0
import enum
import itertools
import json
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch

FOURS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
BLOCKS = (16, 48)
"""The rows of the fake's tiles: up to 16 slots of a call, and above."""


class GemmType(enum.Enum):
    INDEXED = "indexed"
    GROUPED_CONTIGUOUS = "grouped_contiguous"


class HummingInputSchema:
    pass


class BaseWeightSchema:
    @classmethod
    def from_config(cls, config):
        assert config == {"quant_method": "modelopt", "quant_algo": "nvfp4"}
        return cls()

    def convert_humming(
        self,
        tensors,
        shape_n_stacks,
        shape_k_stacks,
        param_dtype,
        num_experts=None,
        device=None,
        convert_symmetric_integer=True,
    ):
        (n,), (k,) = shape_n_stacks, shape_k_stacks
        shapes = {name: tuple(t.shape[1:]) for name, t in tensors.items()}
        want = {"weight": (n, k // 2), "weight_scale": (n, k // 16), "weight_scale_2": (1,)}
        assert shapes == want and param_dtype == torch.bfloat16
        assert {len(t) for t in tensors.values()} == {num_experts}
        assert tensors["weight_scale"].dtype == torch.float8_e4m3fn
        return SimpleNamespace(), dict(tensors)


class HummingMethod:
    @classmethod
    def prepare_layer_meta(
        cls,
        layer,
        shape_n,
        shape_k,
        weight_schema,
        input_schema=None,
        num_experts=None,
        pad_n_to_multiple=1,
        pad_k_to_multiple=1,
        has_bias=False,
        torch_dtype=None,
        sublayer_name="",
        tensors=None,
    ):
        assert isinstance(input_schema, HummingInputSchema) and not has_bias
        padded = -(-shape_n // pad_n_to_multiple) * pad_n_to_multiple
        if not hasattr(layer, "humming_metas"):
            layer.humming_metas = {}
        layer.humming_metas[sublayer_name] = SimpleNamespace(
            shape_n=padded, pad_shape_n=padded - shape_n, to_str=lambda: sublayer_name
        )

    @classmethod
    def transform_humming_layer(cls, layer, sublayer_name="", already_padded=False):
        codes = getattr(layer, f"{sublayer_name}_weight")
        values = FOURS[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()]
        scales = getattr(layer, f"{sublayer_name}_weight_scale").float().repeat_interleave(16, -1)
        scale = getattr(layer, f"{sublayer_name}_weight_scale_2")[:, :, None]
        setattr(layer, f"{sublayer_name}_values", values * scales * scale)

    @classmethod
    def get_default_tuning_configs(
        cls,
        layer,
        use_f16_accum=False,
        use_batch_invariant=False,
        use_m_major_input_scale=False,
        gemm_type="dense",
        sublayer_name="",
    ):
        assert isinstance(gemm_type, GemmType) and sublayer_name in layer.humming_metas
        # The second GEMM has other tiles, so that a call needs two lists of blocks.
        few, many = BLOCKS if sublayer_name == "w13" else (8, 48)
        tiles = [{"block_shape": [rows, 256, 64]} for rows in (few, many)]
        return [(0, 16, tiles[0]), (16, 1 << 30, tiles[1])]

    @classmethod
    def forward_layer(
        cls,
        layer,
        inputs,
        outputs=None,
        input_scale=None,
        input_scale_2=None,
        sorted_ids=None,
        expert_ids=None,
        num_tokens_padded=None,
        expert_layout=None,
        top_k=1,
        valid_shape_m=0,
        compute_config=None,
        tuning_config=None,
        sublayer_name="",
        hadamard_block_size=None,
        use_pdl=None,
    ):
        w = getattr(layer, f"{sublayer_name}_values")
        assert (sublayer_name, compute_config, tuning_config) in HummingKernel.prepared
        assert layer.locks.dtype == torch.int32
        form = json.loads(compute_config)["gemm_type"]
        outputs.fill_(float("nan"))
        if form == "indexed":
            size = json.loads(tuning_config)["block_shape"][0]
            count = int(num_tokens_padded) // size
            for e, ids in zip(expert_ids[:count], sorted_ids.view(-1, size), strict=False):
                assert (ids <= valid_shape_m).all()
                ids = ids[ids < valid_shape_m].long()
                outputs[ids] = (inputs[ids // top_k].float() @ w[e].T).bfloat16()
        else:
            assert form == "grouped_contiguous" and expert_layout.dtype == torch.int32
            for e, (begin, end) in enumerate(itertools.pairwise(expert_layout)):
                outputs[begin:end] = (inputs[begin:end].float() @ w[e].T).bfloat16()
        return outputs


class HummingKernel:
    prepared: ClassVar[set[tuple[str, str, str]]] = set()

    @classmethod
    def prepare_kernels(cls, layer_config, compute_config=None, tuning_config=None, device=None):
        cls.prepared.add((layer_config, compute_config, tuning_config))


@dataclass(frozen=True)
class GemmConfig:
    tile_m: int = 128
    tile_n: int = 192
    tile_k: int | None = None
    num_warps: int | None = None
    pingpong: bool = True
    is_dynamic_persistent: bool = True
    cluster_m: int = 2
    cluster_n: int = 1
    cluster_k: int = 1
    split_k: int = 1
    swap_ab: bool = False
    max_swizzle_size: int = 8
    device_capacity: int = 9
    use_tma_gather: bool = False


def gemm_act(
    A,
    B,
    C=None,
    bias=None,
    activation=None,
    alpha=1.0,
    preact_out=None,
    postact_out=None,
    out_dtype=None,
    postact_dtype=None,
    cu_seqlens_m=None,
    A_idx=None,
    store_preact=True,
    dynamic_scheduler=False,
    tuned=True,
    config=None,
    concat_layout=None,
    split_k=1,
    split_k_mode=0,
):
    assert activation == "swiglu" and not store_preact and not tuned and config.cluster_n == 1
    assert A_idx.dtype == cu_seqlens_m.dtype == torch.int32
    y = _grouped(A[A_idx.long()], B, cu_seqlens_m)
    gate, up = y[:, ::2], y[:, 1::2]
    postact_out.copy_(torch.nn.functional.silu(gate) * up)


def gemm_fn(
    A,
    B,
    out,
    C=None,
    bias=None,
    alpha=1.0,
    beta=1.0,
    cu_seqlens_m=None,
    cu_seqlens_k=None,
    A_idx=None,
    batch_idx_permute=None,
    add_to_output=False,
    dynamic_scheduler=False,
    config=None,
    rounding_mode=0,
    sr_seed=0,
    concat_layout=None,
    SFA=None,
    SFB=None,
    bs_format_a=None,
    bs_format_b=None,
    split_k=1,
    split_k_mode=0,
    SFD=None,
    sfd_norm_const=None,
    SFDCol=None,
):
    out.copy_(_grouped(A, B, cu_seqlens_m))


def _grouped(rows, w, first):
    """[rows, N] fp32 of rows [rows, K] by expert, and w [E, K, N]."""
    out = torch.full((len(rows), w.shape[2]), float("nan"), dtype=torch.float32, device="cpu")
    for e, (begin, end) in enumerate(itertools.pairwise(first)):
        out[begin:end] = rows[begin:end].float() @ w[e].float()
    return out


MODULES = {
    "humming": {},
    "humming.layer": {"HummingMethod": HummingMethod},
    "humming.schema": {
        "BaseWeightSchema": BaseWeightSchema,
        "HummingInputSchema": HummingInputSchema,
    },
    "humming.config": {"GemmType": GemmType},
    "humming.kernel": {"HummingKernel": HummingKernel},
    "quack": {},
    "quack.gemm_interface": {"gemm_act": gemm_act, "gemm_tuned": SimpleNamespace(fn=gemm_fn)},
    "quack.gemm_config": {"GemmConfig": GemmConfig},
}
SIGNATURES = {
    "humming.layer": ("HummingMethod.prepare_layer_meta", "HummingMethod.transform_humming_layer",
                      "HummingMethod.get_default_tuning_configs", "HummingMethod.forward_layer"),
    "humming.schema": ("BaseWeightSchema.from_config", "BaseWeightSchema.convert_humming"),
    "humming.kernel": ("HummingKernel.prepare_kernels",),
    "quack.gemm_interface": ("gemm_act", "gemm_tuned.fn"),
    "quack.gemm_config": ("GemmConfig",),
}  # fmt: skip
"""The functions of each module, whose parameters are those of the library."""


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the fakes where the libraries would be imported from."""
    HummingKernel.prepared.clear()
    for name, contents in MODULES.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
