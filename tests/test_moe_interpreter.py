"""The Triton mixture of experts in the interpreter, against the reference."""

# SPDX-License-Identifier: Apache-2.0
import moe_triton_cases
import pytest
import torch
from nvfp4_moe.kernels import moe
from nvfp4_moe.kernels.target import INTERPRETING
from nvfp4_moe.reference import moe as reference

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETING, reason="set TRITON_INTERPRET=1 to run the interpreter"),
]


@pytest.mark.parametrize("case", moe_triton_cases.CASES, ids=lambda f: f.__name__)
def test_case(case):
    case("cpu")


@pytest.mark.parametrize("ring", [1, 1 << 28])
def test_weights_decoded_before(ring, monkeypatch):
    """One expert's at a time, and all."""
    monkeypatch.setattr(moe, "_DECODED_BYTES", ring)
    for case in (moe_triton_cases.odd_sizes, moe_triton_cases.expert_parallel):
        case("cpu", moe.GemmConfig(128, 16, 64, 1, 4, decoded=True))


@pytest.mark.parametrize("tokens,experts,top_k", [(1, 4, 4), (37, 6, 3), (300, 20, 8)])
@pytest.mark.parametrize("offset,local", [(0, None), (2, 3)])
def test_permutation(tokens, experts, top_k, offset, local):
    g = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, experts, generator=g).topk(top_k).indices.int()
    held = experts if local is None else local
    p = moe.permute(ids, held, offset, 16)
    want = reference.permutation(ids, held, offset)
    assert torch.equal(p.permuted, want)
    here = want >= 0
    assert torch.equal(p.expanded[want[here].long()].long(), here.nonzero()[:, 0])
    seen = torch.zeros(int(here.sum()), dtype=torch.bool)
    for expert, first in p.tiles.T.tolist():
        if expert >= 0:
            rows = range(first, min(first + 16, int(p.end[expert])))
            assert len(rows) > 0
            assert (ids.flatten()[p.expanded[list(rows)].long()] == expert + offset).all()
            assert not seen[list(rows)].any()
            seen[list(rows)] = True
    assert seen.all()
