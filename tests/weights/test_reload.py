"""`Experts.load_` and `Experts.checksum`: the specification, on the CPU."""

# SPDX-License-Identifier: Apache-2.0
import copy
import gc
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from fractions import Fraction

import pytest
import reload_cases as cases
import torch
from paths import ROOT, SUPPORT

from nvfp4_moe import ActivationType, fused_moe
from nvfp4_moe.reference.moe.shards import select_experts, shard_experts
from nvfp4_moe.reference.weights import checksum as checksum_module
from nvfp4_moe.reference.weights.checksum import digests
from nvfp4_moe.reference.weights.prepare import prepare_experts
from nvfp4_moe.reference.weights.versions import tensors_of

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


def test_every_byte_is_written():
    cases.restored("cpu", "reference")


@pytest.mark.parametrize("kind", [SWIGLU, ActivationType.Relu2])
def test_biases_and_limit_follow(kind):
    rows = 80 * (2 if kind.gated else 1)
    given = {"w13_bias": PARAMETERS["w13_bias"][:, :rows], "w2_bias": PARAMETERS["w2_bias"]}
    kept = {"alpha": 1.7} if kind.gated else {}
    for change in (PARAMETERS, {"beta": 0.5, "clamp_limit": 2.0}) if kind.gated else ({},):
        some = given | {name: change[name] for name in ("beta", "clamp_limit") if change}
        static = {"input_amax": 3.0, "intermediate_amax": 5.0}
        experts = prepare_experts(*cases.weights(kind, 0), kind, **some, **kept, **static)
        experts.load_(*cases.weights(kind, 1), **some, **kept, **static)
        want = prepare_experts(*cases.weights(kind, 1), kind, **some, **kept, **static)
        cases.assert_same(experts, want, kind.name)


def test_the_layer_computes_with_the_new_weights():
    x = torch.randn(5, 208, generator=torch.Generator().manual_seed(2)).bfloat16()
    routing = torch.tensor([[0, 2]] * 5, dtype=torch.int32), torch.full((5, 2), 0.5).bfloat16()
    experts, want = layer(0), fused_moe(x, layer(1), routing)
    assert not torch.equal(fused_moe(x, experts, routing), want)
    experts.load_(*cases.weights(SWIGLU, 1))
    assert torch.equal(fused_moe(x, experts, routing), want)


W13, W2 = (w.clone() for w in cases.weights(SWIGLU, 1))
META = {"dtype": torch.bfloat16, "device": "meta"}
BAD = [
    ({"w13": None}, TypeError, "w13 is None; it must be a tensor of bfloat16 or float16"),
    ({"w13": W13.float()}, ValueError, "w13 is float32 .*; it must be a tensor of bfloat16 or"),
    ({"w13": W13[:, :, :192]}, ValueError, "w13 is .*[3, 160, 192]; .*[n, 160, 208]"),
    ({"w13": W13[0]}, ValueError, "w13 is bfloat16 [160, 208]; .*[n, 160, 208]"),
    ({"w13": W13.to_sparse()}, ValueError, "w13 has the layout sparse_coo"),
    ({"w13": W13.new_empty(W13.shape, **META)}, ValueError, "w13 is on meta; it must be on"),
    ({"w2": W2[:2]}, ValueError, "w2 is .*[2, 208, 80]; .*[3, 208, 80]"),
    ({"w2": W2.half()}, ValueError, "w2 is float16 .*; it must be a tensor of bfloat16"),
    ({"w2": W2.to_sparse()}, ValueError, "w2 has the layout sparse_coo"),
    ({"w2": W2.to(torch.complex64)}, ValueError, "w2 is complex64"),
    ({"w2": torch.empty(W2.shape, **META)}, ValueError, "w2 is on meta"),
    ({"first": 1}, ValueError, "first is 1; 3 experts from there must be of 3"),
    ({"first": -1}, ValueError, "first is -1; 3 experts from there must be of 3"),
    ({"first": True}, TypeError, "first is True; it must be an integer"),
    ({"first": 0.0}, TypeError, "first is 0.0; it must be an integer"),
    (
        {"backend": "cuda"},
        ValueError,
        "backend is 'cuda'; it must be one of auto, reference, triton",
    ),
    ({"backend": None}, TypeError, "backend is None; it must be one of auto, reference, triton"),
    ({"w13": W13 * torch.nan}, ValueError, "w13[0]"),
    ({"w2": W2 / 0}, ValueError, "w2[0]"),
    ({"recipe": "exact"}, TypeError, "recipe is 'exact'; it must be a Recipe"),
    ({"amax": torch.ones(3)}, TypeError, "amax is float32 [3]; it must be two tensors"),
    ({"amax": (torch.ones(3), torch.ones(2))}, ValueError, "amax[1] is float32 [2]; .*[3]"),
    ({"amax": (torch.ones(3), None)}, TypeError, "amax[1] is None"),
    ({"amax": (torch.ones(3), torch.ones(3).double())}, ValueError, "amax[1] is float64"),
    ({"amax": (-torch.ones(3), torch.ones(3))}, ValueError, "amax[0][0] is -1.0, .*0 or above"),
    ({"amax": (torch.ones(3), torch.ones(3) * torch.nan)}, ValueError, "amax[1][0] is nan"),
    ({"amax": (torch.ones(3), torch.ones(3) / 0)}, ValueError, "amax[1][0] is inf"),
]
GIVEN = PARAMETERS | {"alpha": 1.7, "input_amax": 3.0, "intermediate_amax": 5.0}
BAD_OPTIONS = [
    (option, value, error)
    for option in ("alpha", "beta", "clamp_limit")
    for value, error in (
        ("x", TypeError), ([1.0, 2.0, 3.0], TypeError), (1j, TypeError), (True, TypeError),
        (float("nan"), ValueError), (1e39, ValueError), (-1e39, ValueError), (10**400, ValueError),
        (10**5000, ValueError), (torch.ones(2), ValueError), (torch.ones(3, 1), ValueError),
        (torch.ones(3, device="meta"), ValueError), (torch.ones(3).to_sparse(), ValueError),
        (torch.ones(3, dtype=torch.complex64), ValueError), (torch.ones(3).bool(), ValueError),
        (torch.ones(3).int(), ValueError), (torch.ones(3).to(torch.float8_e4m3fn), ValueError),
    )
] + [
    (option, make(PARAMETERS[option]), error)
    for option in ("w13_bias", "w2_bias")
    for make, error in (
        (lambda b: 1.0, TypeError), (lambda b: b.tolist(), TypeError),
        (lambda b: b[:, 1:], ValueError), (lambda b: b[:2], ValueError),
        (lambda b: b[0], ValueError), (lambda b: b.to_sparse(), ValueError),
        (lambda b: b.to("meta"), ValueError), (lambda b: b.to(torch.complex64), ValueError),
        (lambda b: b.bool(), ValueError), (lambda b: b.int(), ValueError),
    )
] + [
    (option, value, error)
    for option in ("input_amax", "intermediate_amax")
    for value, error in (
        ("x", TypeError), (torch.ones(1), TypeError), (True, TypeError), (0.0, ValueError),
        (-1.0, ValueError), (float("inf"), ValueError), (float("nan"), ValueError),
        (10**400, ValueError), (Fraction(1, 10**400), ValueError),
    )
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_leave_the_experts_alone(change, error, message):
    experts = layer()
    before = experts.checksum()
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(error, match=pattern):
        experts.load_(**({"w13": W13, "w2": W2} | change))
    assert experts.checksum() == before


def test_the_checksum_names_the_version_where_it_is_not_the_default():
    experts = layer()
    assert experts.checksum() == experts.checksum("0.7.2") != experts.checksum("0.7.4")
    with pytest.raises(ValueError, match=r"flashinfer is '0.7.3'; it must be one of"):
        experts.checksum("0.7.3")


def test_the_checksum_has_the_table_of_the_functions(monkeypatch):
    experts = layer()
    hopper = experts.checksum(functions="hopper")
    assert experts.checksum() == experts.checksum(functions="exact") != hopper
    monkeypatch.setattr(checksum_module, "checksum_of_functions", lambda name: "another table")
    assert experts.checksum(functions="hopper") not in (hopper, experts.checksum())
    with pytest.raises(ValueError, match="functions is 'ada'; it must be one of exact, hopper"):
        experts.checksum(functions="ada")


def test_bad_options_leave_the_experts_alone():
    experts = layer(**GIVEN)
    before = experts.checksum()
    for option, value, error in BAD_OPTIONS:
        with pytest.raises(error, match=rf"^{option}\b"):
            experts.load_(W13, W2, **GIVEN | {option: value})
        assert experts.checksum() == before, (option, value)


def test_the_options_of_the_preparation_must_come_with_the_weights():
    experts = layer(**GIVEN)
    before = experts.checksum()
    for option in GIVEN:
        given = {name: value for name, value in GIVEN.items() if name != option}
        with pytest.raises(ValueError, match=f"^{option} is missing"):
            experts.load_(W13, W2, **given)
        with pytest.raises(ValueError, match=f"^{option} is given; .* prepared without"):
            layer().load_(W13, W2, **{option: GIVEN[option]})
    names = "w13_bias, w2_bias, alpha, beta, clamp_limit, input_amax, intermediate_amax are missing"
    with pytest.raises(ValueError, match=names):
        experts.load_(W13, W2)
    assert experts.checksum() == before


def test_no_gradient_and_no_copy_of_the_weights_is_kept():
    """The trainer's weights require gradients, and what it hands over is the end of a graph."""
    masters = [w.float().requires_grad_() for w in cases.weights(SWIGLU, 0)]
    given = {k: v.clone().requires_grad_() for k, v in PARAMETERS.items()}
    experts = prepare_experts(*(w.bfloat16() for w in masters), SWIGLU, **given)
    kept = []
    for _ in range(3):
        w13, w2 = (w.bfloat16() for w in masters)
        assert w13.requires_grad
        kept += [weakref.ref(w13), weakref.ref(w2)]
        experts.load_(w13, w2, **given)
        del w13, w2
    gc.collect()
    assert not any(ref() is not None for ref in kept)
    assert not any(t.requires_grad for t in tensors_of(experts))
    copied = copy.deepcopy(experts)
    cases.assert_same(copied, experts, "a deep copy")


def test_experts_made_in_inference_mode():
    with torch.inference_mode():
        experts = layer(0)
    experts.load_(*cases.weights(SWIGLU, 1))
    cases.assert_same(experts, layer(1), "outside")
    with torch.inference_mode():
        experts.load_(*cases.weights(SWIGLU, 0))
    cases.assert_same(experts, layer(0), "inside")


def test_a_reload_writes_no_tensor_of_another():
    """Neither an argument of the preparation, nor the layer that a part was taken from."""
    given = {"alpha": torch.full((3,), 1.5), "input_amax": 3.0, "intermediate_amax": 5.0}
    whole = layer(**given)
    before = whole.checksum()
    selected, shard = select_experts(whole, 1, 2), shard_experts(whole, 0, 1)
    shard.load_(W13, W2, alpha=2.5, input_amax=4.0, intermediate_amax=6.0)
    selected.load_(W13[1:], W2[1:], alpha=2.5, input_amax=4.0, intermediate_amax=6.0)
    assert whole.checksum() == before
    whole.load_(W13, W2, **given | {"alpha": 2.5})
    assert (given["alpha"] == 1.5).all()


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
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT), str(SUPPORT)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == layer(1).checksum() != layer(0).checksum()
