"""`Experts.load_` and `Experts.checksum`: the specification, on the CPU."""

# SPDX-License-Identifier: Apache-2.0
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import reload_cases as cases
import torch
from nvfp4_moe.reference.checksum import digests
from nvfp4_moe.reference.experts import prepare_experts

from nvfp4_moe import ActivationType, fused_moe

SWIGLU = ActivationType.Swiglu
PARAMETERS = {
    "w13_bias": torch.linspace(-1, 1, 3 * 160).reshape(3, 160),
    "w2_bias": torch.linspace(-2, 1, 3 * 208).reshape(3, 208),
    "beta": torch.tensor([0.25, 1.0, -0.5]),
    "clamp_limit": torch.tensor([1.5, 2.5, 3.5]),
}


def layer(seed=0, **options):
    return prepare_experts(*cases.weights(SWIGLU, seed), SWIGLU, **options)


def test_reload_is_preparation():
    cases.each_way("cpu", "reference")


@pytest.mark.parametrize("kind", [SWIGLU, ActivationType.Relu2])
def test_biases_and_limit_follow(kind):
    rows = 80 * (2 if kind.gated else 1)
    given = {"w13_bias": PARAMETERS["w13_bias"][:, :rows], "w2_bias": PARAMETERS["w2_bias"]}
    kept = {"alpha": 1.7} if kind.gated else {}
    for change in (PARAMETERS, {"beta": 0.5, "clamp_limit": 2.0}) if kind.gated else ({},):
        some = given | {name: change[name] for name in ("beta", "clamp_limit") if change}
        static = {"input_amax": 3.0, "intermediate_amax": 5.0}
        experts = prepare_experts(*cases.weights(kind, 0), kind, **some, **kept, **static)
        experts.load_(*cases.weights(kind, 1), **some)
        want = prepare_experts(*cases.weights(kind, 1), kind, **some, **kept, **static)
        cases.assert_same(experts, want, kind.name)


def test_the_layer_computes_with_the_new_weights():
    x = torch.randn(5, 208, generator=torch.Generator().manual_seed(2)).bfloat16()
    routing = torch.tensor([[0, 2]] * 5, dtype=torch.int32), torch.full((5, 2), 0.5).bfloat16()
    experts, want = layer(0), fused_moe(x, layer(1), routing)
    assert not torch.equal(fused_moe(x, experts, routing), want)
    experts.load_(*cases.weights(SWIGLU, 1))
    assert torch.equal(fused_moe(x, experts, routing), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w13": torch.zeros(3, 160, 208)}, "w13 is torch.float32; it must be a bf16 or fp16"),
        ({"w13": torch.zeros(3, 160, 192).bfloat16()}, "w13 is .*(3, 160, 192).*[3, 160, 208]"),
        ({"w2": torch.zeros(2, 208, 80).bfloat16()}, "w2 is .*(2, 208, 80).*[3, 208, 80]"),
        ({"w2": torch.zeros(3, 208, 80).half()}, "w2 is torch.float16 .* take torch.bfloat16"),
        (
            {"w2": torch.zeros(3, 208, 80, dtype=torch.bfloat16, device="meta")},
            "w2 is .* on meta; these experts take .* on cpu",
        ),
        ({"first": 1}, "first is 1; 3 experts from there must be of 3"),
        ({"first": -1}, "first is -1"),
        ({"backend": "cuda"}, "backend is 'cuda'; it must be one of auto, reference, triton"),
        ({"amax": torch.ones(3)}, "amax must be two tensors"),
        ({"amax": (torch.ones(3), torch.ones(2))}, "amax[1] is .*(2,)"),
        ({"w2_bias": torch.zeros(3, 208)}, "w2_bias is given; these experts were prepared without"),
        ({"clamp_limit": 1.0}, "clamp_limit is given"),
        ({"beta": 1.0}, "beta is given; these experts were prepared without"),
        ({"beta": torch.ones(2)}, "beta has shape (2,); it must be [3]"),
    ],
)
def test_bad_arguments_leave_the_experts_alone(change, message):
    experts = layer()
    before = experts.checksum()
    w13, w2 = cases.weights(SWIGLU, 1)
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(ValueError, match=pattern):
        experts.load_(**({"w13": w13, "w2": w2} | change))
    assert experts.checksum() == before


@pytest.mark.parametrize("missing", list(PARAMETERS))
def test_what_depends_on_the_weights_must_come_with_them(missing):
    experts = layer(**PARAMETERS)
    before = experts.checksum()
    given = {name: value for name, value in PARAMETERS.items() if name != missing}
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        experts.load_(*cases.weights(SWIGLU, 1), **given)
    assert experts.checksum() == before


def test_no_expert():
    experts = layer()
    before = experts.checksum()
    w13, w2 = cases.weights(SWIGLU, 1)
    experts.load_(w13[:0], w2[:0], first=3)
    assert experts.checksum() == before


def test_checksum_is_of_every_bit():
    experts = layer(**PARAMETERS, input_amax=3.0, intermediate_amax=5.0, alpha=1.0)
    seen = {experts.checksum()}
    assert len(seen) == 1 and re.fullmatch("[0-9a-f]{64}", next(iter(seen)))
    for name in vars(experts):
        value = getattr(experts, name)
        if not isinstance(value, torch.Tensor):
            continue
        for place in (0, -1):
            changed = value.clone()
            changed.view(torch.uint8).view(-1)[place] ^= 1
            seen.add(replace(experts, **{name: changed}).checksum())
    tensors = sum(isinstance(v, torch.Tensor) for v in vars(experts).values())
    assert tensors == 14 and len(seen) == 1 + 2 * tensors
    seen.add(replace(experts, hidden_size=192).checksum())
    seen.add(replace(experts, activation=ActivationType.Geglu).checksum())
    swapped = experts.gemm2_weights[[1, 0, 2]]
    seen.add(replace(experts, gemm2_weights=swapped).checksum())
    assert len(seen) == 4 + 2 * tensors


def test_digests_are_the_formula():
    """In Python's integers; and parts, odd addresses and lengths do not matter."""

    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    data = torch.randint(
        0, 256, (53,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    for start, end in ((0, 53), (3, 48), (0, 0), (0, 7)):
        part = data[start:end]
        padded = bytes(part.tolist()) + bytes(-len(part) % 8)
        words = [int.from_bytes(padded[i : i + 8], "little") for i in range(0, len(padded), 8)]
        seeds = (0x243F6A8885A308D3, 0x13198A2E03707344)
        want = [
            sum(mix(w ^ mix((i + s) % 2**64)) for i, w in enumerate(words)) % 2**64 for s in seeds
        ]
        assert digests(part) == want


def test_checksums_agree_between_processes():
    """A trainer that prepared the weights, and a server that loaded them into others."""
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import reload_cases as cases\n"
        "from nvfp4_moe import ActivationType, prepare_experts\n"
        "kind = ActivationType.Swiglu\n"
        "experts = prepare_experts(*cases.weights(kind, 0), kind)\n"
        "experts.load_(*cases.weights(kind, 1))\n"
        "print(experts.checksum())\n"
    )
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", program, str(tests.parent), str(tests)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == layer(1).checksum() != layer(0).checksum()
