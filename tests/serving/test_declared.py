"""The format that a checkpoint declares, and the fused matrices that its patterns exclude."""

# SPDX-License-Identifier: Apache-2.0
import pytest

from nvfp4_moe.serving.declared import declares_modelopt_nvfp4, excludes_parts, kind_of

MAPPING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


@pytest.mark.parametrize("parent", ["", "model.layers.0.self_attn."], ids=["bare", "nested"])
@pytest.mark.parametrize("count", [0, 2, 3])
def test_a_fused_matrix_is_excluded_with_all_of_its_parts(parent, count):
    patterns = {f"{parent}{part}" for part in MAPPING["qkv_proj"][:count]}
    found = excludes_parts(patterns.__contains__, MAPPING, f"{parent}qkv_proj")
    assert found == (count == 3)
    assert not excludes_parts(patterns.__contains__, None, f"{parent}qkv_proj")
    assert excludes_parts({f"{parent}qkv_proj"}.__contains__, MAPPING, f"{parent}qkv_proj")


@pytest.mark.parametrize("inner", ["x", [1], 3, None, {}])
def test_a_quantization_that_is_no_object(inner):
    config = {"quant_method": "modelopt", "quantization": inner}
    assert not declares_modelopt_nvfp4(config)
    with pytest.raises(ValueError, match="quant_method is 'modelopt', its quant_algo None"):
        kind_of(config)
    assert kind_of(config | {"quant_algo": "NVFP4"}) == "modelopt"
