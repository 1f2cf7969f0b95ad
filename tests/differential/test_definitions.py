"""The judge of a definition's output: a right output passes, and one element decides."""

# SPDX-License-Identifier: Apache-2.0
import json

import moe_cases
import pytest
import torch
from substitution_cases import GROUPS, SHAPE, call, ours, routed, write_solutions

import nvfp4_moe
from nvfp4_moe.differential import definitions
from nvfp4_moe.reference.moe.routing import pack_topk

CASES = {
    "moe_fp4_block_scale_default_routing_topk2_e8_h256_i64_act3": {"routing_method_type": 0},
    "moe_fp4_block_scale_ds_routing_topk2_e8_h256_i64_act3_ng4_kg2": GROUPS,
}
GIVEN = "trtllm_fp4_block_scale_routed_moe_topk2_e8_h256_act3"


@pytest.fixture(scope="module")
def definition(tmp_path_factory):
    """A function from a name to the definition that FlashInfer itself writes."""
    reason = "flashinfer-python is not installed (pip install 'nvfp4-moe[flashinfer]')"
    pytest.importorskip("flashinfer", reason=reason)
    folder = write_solutions(tmp_path_factory.mktemp("solutions"))
    return lambda name: json.loads((folder / f"definitions/moe/{name}.json").read_text("utf-8"))


def inputs_of(definition, given):
    return {name: given.get(name) for name in definition["inputs"]}


def off_by_some(output):
    """One element is wrong by more than its interval, and by less than a hundredth."""
    wrong = output.clone()
    wrong[3, 7] *= 1 + 2**-7
    assert (wrong - output).abs().max() < 1e-2 * output.abs().max()
    return wrong


@pytest.mark.parametrize("name", CASES)
def test_an_output_of_logits(definition, name):
    document, given = definition(name), call(**CASES[name])
    output = ours(**given)[0]
    inputs = inputs_of(document, given)
    assert definitions.outside(document, inputs, output) is None
    found = definitions.outside(document, inputs, off_by_some(output))
    assert (found.count, found.token, found.column) == (1, 3, 7)


def test_an_output_of_a_given_routing(definition):
    case = moe_cases.make(SHAPE)
    given = routed(topk_ids=pack_topk(case.ids, case.weights))
    output = nvfp4_moe.trtllm_fp4_block_scale_routed_moe(**given, backend="reference")[0]
    document = definition(GIVEN)
    inputs = inputs_of(document, given)
    assert definitions.outside(document, inputs, output) is None
    assert definitions.outside(document, inputs, off_by_some(output)).count == 1


def test_a_definition_that_is_not_known():
    with pytest.raises(ValueError, match="the definition is 'rmsnorm_h256'; the judge knows"):
        definitions.outside({"name": "rmsnorm_h256", "axes": {}}, {}, torch.empty(0))
