"""The adapters to FlashInfer, without a GPU: its signature, our arguments, every refusal.

What FlashInfer's kernels compute is compared on a Blackwell GPU, by the differential tests. Here
FlashInfer's Python runs up to the kernel, which the reference stands in for.
"""

# SPDX-License-Identifier: Apache-2.0
import inspect
import re
import types

import pytest
import torch
from assertions import assert_bitwise
from installations import pretend

from nvfp4_moe import NVFP44Over6Config, SfLayout, nvfp4_quantize
from nvfp4_moe.kernels import environment
from nvfp4_moe.kernels.backends import UnsupportedError
from nvfp4_moe.kernels.flashinfer import quantize as fi
from nvfp4_moe.kernels.flashinfer import version
from nvfp4_moe.kernels.quantize import api as quantize_api
from nvfp4_moe.kernels.quantize.api import QUANTIZE
from nvfp4_moe.kernels.quantize.call import UNSET, make_quantize_call
from nvfp4_moe.reference import layouts
from nvfp4_moe.reference import quantize as reference
from nvfp4_moe.reference.recipe import Recipe

NEW, OLD = environment.EXACT_VARIABLES["cuda"]
G = 1 / 2688
CUDA, CUTE_DSL, CAKE = fi.BUILDS
NAMES = (
    "a",
    "a_global_sf",
    "sfLayout",
    "do_shuffle",
    "sf_vec_size",
    "enable_pdl",
    "backend",
    "per_token_activation",
    "expanded_idx_to_permuted_idx",
    "out_scale",
    "nvfp4_4over6",
)
DEFAULTS = {
    "sfLayout": 0,
    "do_shuffle": False,
    "sf_vec_size": 16,
    "enable_pdl": None,
    "backend": "cuda",
    "per_token_activation": False,
    "expanded_idx_to_permuted_idx": None,
    "out_scale": None,
}
"""The defaults of nvfp4_quantize in flashinfer-python 0.7.2; two have none, the last a sentinel."""


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in environment.VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def usable(monkeypatch):
    """As on a machine where every FlashInfer backend is installed completely."""
    pretend(monkeypatch)


def matrix(m=128, k=64, dtype=torch.bfloat16, device="meta"):
    return torch.empty(m, k, dtype=dtype, device=device)


def ask(a=None, scale=G, *, capability=(10, 0), build="cuda", **named):
    """A request with the defaults of the public call, per token unless said otherwise."""
    arguments = {
        "sfLayout": SfLayout.layout_128x4,
        "do_shuffle": False,
        "sf_vec_size": 16,
        "enable_pdl": None,
        "per_token_activation": True,
        "expanded_idx_to_permuted_idx": None,
        "out_scale": None,
        "nvfp4_4over6": UNSET,
        "fast_math": None,
    } | named
    return make_quantize_call(
        matrix() if a is None else a, scale, **arguments, build=build, capability=capability
    )


def ask_global(a=None, scale=1.0, **named):
    return ask(a, scale, per_token_activation=False, **named)


# The signature


def test_flashinfers_signature(flashinfer):
    every = inspect.signature(flashinfer.nvfp4_quantize).parameters
    parameters = {n: p for n, p in every.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    is_new = version.HERE.described_as in version.SINCE_NEW
    assert tuple(parameters) == NAMES, (
        f"flashinfer.nvfp4_quantize has other parameters: gone {sorted(set(NAMES) - set(parameters))}, "
        f"new {sorted(set(parameters) - set(NAMES))}, or another order"
    )
    assert [n for n in every if n not in parameters] == (["batch_invariant"] if is_new else [])
    defaults = DEFAULTS | ({"backend": "auto"} if is_new else {})
    for name, p in parameters.items():
        if name in defaults:
            assert p.default == defaults[name], f"the default of {name} is {p.default!r} now"
    assert parameters["a"].default is parameters["a_global_sf"].default is inspect.Parameter.empty
    sentinel = type(parameters["nvfp4_4over6"].default).__name__
    assert sentinel == "_UnsetType", f"the default of nvfp4_4over6 is a {sentinel} now"


def test_our_signature_is_flashinfers():
    parameters = inspect.signature(nvfp4_quantize).parameters
    positional = {n: p for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert tuple(positional) == NAMES
    ours = DEFAULTS | {"backend": "auto", "nvfp4_4over6": UNSET}
    assert {n: p.default for n, p in positional.items() if n in ours} == ours
    keyword = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert keyword == ["fast_math", "build"]


def test_explain_takes_the_same_arguments():
    quantize = inspect.signature(nvfp4_quantize).parameters
    asked = dict(inspect.signature(quantize_api.explain).parameters)
    assert asked.pop("capability").default is None
    assert list(asked.values()) == list(quantize.values())


def test_names_and_values_of_its_enums(flashinfer):
    from flashinfer.quantization import nvfp4_quantization_utils as utils

    from nvfp4_moe import NVFP44Over6ErrMode

    assert {x.name: x.value for x in flashinfer.SfLayout} == {x.name: x.value for x in SfLayout}
    assert {x.name: x.value for x in utils.NVFP44Over6ErrMode} == {
        x.name: x.value for x in NVFP44Over6ErrMode
    }
    fields = inspect.signature(utils.NVFP44Over6Config).parameters
    ours = inspect.signature(NVFP44Over6Config).parameters
    assert {n: p.default for n, p in fields.items()} == {n: p.default for n, p in ours.items()}


# The arguments we pass


@pytest.fixture
def called(flashinfer, monkeypatch):
    """Record the arguments of flashinfer.nvfp4_quantize; torch.tensor, which breaks capture, raises."""
    calls = []
    signature = inspect.signature(flashinfer.nvfp4_quantize)

    def record(*args, **kwargs):
        assert not args, "FlashInfer must be called by keywords"
        calls.append(signature.bind(*args, **kwargs).arguments)
        return "codes", "scales", "token"

    def forbidden(*args, **kwargs):
        raise AssertionError("torch.tensor copies from the host, which breaks graph capture")

    monkeypatch.setattr(flashinfer, "nvfp4_quantize", record)

    def run(backend, request):
        with monkeypatch.context() as m:
            m.setattr(torch, "tensor", forbidden)
            QUANTIZE.run(backend, request)
        return calls.pop()

    return run


def is_device_scalar(scale, value):
    return (
        isinstance(scale, torch.Tensor)
        and scale.dtype == torch.float32
        and scale.shape == (1,)
        and scale.item() == torch.full((), value).item()
    )


@pytest.mark.parametrize("scale", [G, 1], ids=["float", "int"])
def test_cuda_per_token_gets_a_float(called, scale):
    passed = called(CUDA, ask(matrix(device="cpu"), scale))["a_global_sf"]
    assert type(passed) is float and passed == scale


def test_cuda_per_token_reads_a_cpu_tensor(called):
    passed = called(CUDA, ask(matrix(device="cpu"), torch.full((1,), 0.25)))["a_global_sf"]
    assert type(passed) is float and passed == 0.25


@pytest.mark.parametrize("backend", [CUTE_DSL, CAKE])
def test_cute_dsl_per_token_gets_a_device_tensor(called, backend):
    request = ask(matrix(device="cpu"), build="cute-dsl")
    assert is_device_scalar(called(backend, request)["a_global_sf"], G)


@pytest.mark.parametrize("backend", [CUDA, CUTE_DSL])
def test_a_global_scale_is_a_device_tensor(called, backend):
    request = ask_global(matrix(device="cpu"), 0.3, build=fi.BUILDS[backend])
    assert is_device_scalar(called(backend, request)["a_global_sf"], 0.3)


def test_tensors_are_passed_on(called):
    a, scale, out = matrix(device="cpu"), torch.ones(1), torch.ones(1)
    passed = called(CUTE_DSL, ask(a, scale, build="cute-dsl", out_scale=out))
    assert passed["a"] is a and passed["a_global_sf"] is scale and passed["out_scale"] is out
    index = torch.arange(128, dtype=torch.int32)
    passed = called(CUDA, ask(a, expanded_idx_to_permuted_idx=index))
    assert passed["expanded_idx_to_permuted_idx"] is index


def test_what_its_kernels_check_is_made_contiguous(called):
    index = torch.arange(256, dtype=torch.int32)[::2]
    passed = called(CUDA, ask(matrix(device="cpu"), expanded_idx_to_permuted_idx=index))
    passed = passed["expanded_idx_to_permuted_idx"]
    assert passed.is_contiguous() and passed.tolist() == index.tolist()
    scales = torch.arange(256.0)[::2]
    passed = called(CUDA, ask_global(matrix(device="cpu"), scales))["a_global_sf"]
    assert passed.is_contiguous() and passed.tolist() == scales.tolist()


@pytest.mark.parametrize("backend", fi.BUILDS)
@pytest.mark.parametrize("per_token", [True, False])
def test_the_rest_of_the_arguments(flashinfer, called, backend, per_token):
    request = ask(
        matrix(device="cpu"),
        1.0,
        sfLayout=SfLayout.layout_8x4,
        enable_pdl=False,
        per_token_activation=per_token,
        build=fi.BUILDS[backend],
    )
    passed = called(backend, request)
    assert passed["backend"] == backend.removeprefix("flashinfer:")
    assert passed["sfLayout"] is flashinfer.SfLayout.layout_8x4
    rest = {n: passed[n] for n in ("do_shuffle", "sf_vec_size", "enable_pdl", "out_scale")}
    assert rest == {"do_shuffle": False, "sf_vec_size": 16, "enable_pdl": False, "out_scale": None}
    assert passed["per_token_activation"] is per_token
    assert passed["expanded_idx_to_permuted_idx"] is None


def test_four_over_six_stays_omitted_or_becomes_flashinfers(flashinfer, called, monkeypatch):
    from flashinfer.quantization.nvfp4_quantization_utils import NVFP44Over6Config as Theirs

    a = matrix(device="cpu")
    assert "nvfp4_4over6" not in called(CUDA, ask(a, 1.0))
    assert called(CUDA, ask(a, nvfp4_4over6=None))["nvfp4_4over6"] is None
    ours = NVFP44Over6Config(256, "MSE", True)
    passed = called(CUDA, ask(a, 1 / 1536, nvfp4_4over6=ours))["nvfp4_4over6"]
    assert type(passed) is Theirs and passed == Theirs(256, "MSE", True)
    # Its CuTe-DSL kernel rejects e4m3 input while the environment asks for 4over6.
    monkeypatch.setenv("FLASHINFER_NVFP4_4OVER6", "1")
    e4m3 = matrix(device="cpu", dtype=torch.float8_e4m3fn)
    passed = called(CUTE_DSL, ask_global(e4m3, build="cute-dsl"))
    assert passed["nvfp4_4over6"] is None


def test_a_program_that_is_missing_is_unsupported(flashinfer, monkeypatch):
    def missing(**kwargs):
        raise NotImplementedError("no program for quant:t1")

    monkeypatch.setattr(flashinfer, "nvfp4_quantize", missing)
    with pytest.raises(UnsupportedError, match=r"flashinfer:cake .*quant:t1"):
        QUANTIZE.run(CAKE, ask(matrix(device="cpu"), build="cute-dsl"))


# FlashInfer's own Python, around the reference in place of its kernels


@pytest.fixture
def hollow(flashinfer, monkeypatch):
    """FlashInfer whose CUDA module is the reference, on CPU tensors."""
    from flashinfer.quantization import fp4_quantization as theirs

    def per_token(a, scale_inv, index, layout, code):
        recipe = Recipe.from_code(code)
        q = reference.quantize_per_token(a, scale_inv, recipe, SfLayout(layout), row_index=index)
        return q.codes, q.block_scales, q.per_token_scale

    def global_scale(a, scale, vec, ue8m0, swizzled, is_8x4, inverse, pdl, code):
        assert (vec, ue8m0, inverse) == (16, False, False)
        layout = SfLayout.layout_8x4 if is_8x4 else SfLayout.layout_128x4
        layout = layout if swizzled else SfLayout.layout_linear
        q = reference.quantize_global_scale(a, scale, Recipe.from_code(code), layout)
        return q.codes, q.block_scales.flatten()

    module = types.SimpleNamespace(
        nvfp4_quant_and_per_token_scale_sm100=per_token,
        fp4_quantize_sm100=global_scale,
        block_scale_interleave_sm100=lambda sf: layouts.from_linear(
            sf, SfLayout.layout_128x4
        ).flatten(),
    )
    monkeypatch.setattr(theirs, "get_fp4_quantization_module", lambda arch: module)
    monkeypatch.setattr(theirs, "get_compute_capability", lambda device: (10, 0))
    monkeypatch.setattr(theirs, "device_support_pdl", lambda device: True)
    if version.HERE.described_as in version.SINCE_NEW:  # it asks for the capability at hand
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(theirs, "_check_block_scale_quantization_support", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)


FOUR = NVFP44Over6Config(256, "MSE", False)
WRAPPED = {
    "per token": {"per_token_activation": True},
    "per token, 4over6": {"per_token_activation": True, "nvfp4_4over6": FOUR, "scale": 1 / 1536},
    "per token, off": {"per_token_activation": True, "nvfp4_4over6": None},
    "index": {
        "per_token_activation": True,
        "expanded_idx_to_permuted_idx": torch.arange(127, -1, -1, dtype=torch.int32),
    },
    "global": {"per_token_activation": False, "scale": 30.0},
    "global, rows": {"per_token_activation": False, "scale": torch.linspace(1, 90, 128)},
    "global, 4over6": {"per_token_activation": False, "scale": 20.0, "nvfp4_4over6": FOUR},
    "e4m3": {"per_token_activation": False, "scale": 50.0, "dtype": torch.float8_e4m3fn},
}


@pytest.mark.parametrize("layout", ["shuffle", *SfLayout], ids=lambda x: getattr(x, "name", x))
@pytest.mark.parametrize("case", WRAPPED)
def test_shapes_and_shuffle_equal_flashinfers_wrapper(hollow, case, layout):
    named = dict(WRAPPED[case])
    rng = torch.Generator().manual_seed(1)
    a = torch.randn(128, 192, generator=rng).to(named.pop("dtype", torch.bfloat16))
    scale = named.pop("scale", G)
    if layout == "shuffle":
        named["do_shuffle"] = True
    else:
        a, named["sfLayout"] = a[:, :112].contiguous(), layout
    request = ask(a, scale, **named)
    theirs = QUANTIZE.run(CUDA, request)
    ours = QUANTIZE.run("reference", request)
    for got, want, what in zip(ours, theirs, ("codes", "block scales", "token"), strict=False):
        assert_bitwise(got, want, what)
    assert len(ours) == len(theirs)


# The capability table: (backend, a piece of the reason, the request, what to patch)

ROWS = torch.ones(128, device="meta")
ONE = torch.ones(1, device="meta")
INDEX = torch.arange(128, dtype=torch.int32, device="meta")
FOUR_448 = NVFP44Over6Config()


def misaligned(elements, dtype=torch.bfloat16):
    return torch.empty(128 * 64 + elements, dtype=dtype, device="meta")[elements:].view(128, 64)


def of_build(backend, maker, *args, **named):
    return lambda: maker(*args, build=fi.BUILDS[backend], **named)


REFUSED = [
    *(
        (b, reason, of_build(b, ask, *args, **named), patch)
        for b in fi.BUILDS
        for reason, args, named, patch in (
            (r"not installed \(pip install 'nvfp4-moe\[flashinfer\]'\)", (), {}, "absent"),
            ("older than 0.7", (), {}, "older"),
            ("0.7.9 is not described; those before 0.7.3 and 0.7.4 are. Its fun", (), {}, "newer"),
            ("of an unknown version is not described", (), {}, "unknown"),
            ("torch.compile cannot trace", (), {}, "compiling"),
            ("a is on the meta", (), {"capability": None}, None),
            ("sm_90 is before Blackwell", (), {"capability": (9, 0)}, None),
        )
    ),
    *((b, "a is float32", lambda: ask(matrix(dtype=torch.float32)), None) for b in fi.BUILDS),
    (CUDA, "sm_101 has no kernels", lambda: ask(capability=(10, 1)), None),
    (CUDA, 'build="cuda", not of cute-dsl', lambda: ask(build="cute-dsl"), None),
    (CUDA, f"says fast, not exact: set {NEW}=1", lambda: ask(fast_math=False), None),
    (CUDA, f"says exact, not fast: unset {NEW} and {OLD}", lambda: ask(fast_math=True), "exact"),
    (CUDA, "out_scale", lambda: ask(out_scale=ONE), None),
    (CUDA, "a is not contiguous", lambda: ask(matrix(64, 128).t()), None),
    (CUDA, "a is not contiguous", lambda: ask_global(matrix(64, 128).t()), None),
    (CUDA, "rows have stride 1", lambda: ask_global(matrix(64, 1).t()), None),
    (CUDA, "multiple of 32 bytes", lambda: ask(misaligned(8)), None),
    (CUDA, "multiple of 32", lambda: ask_global(misaligned(8, torch.float8_e4m3fn)), None),
    (CUDA, "TMA", lambda: ask_global(matrix(1024, 512, torch.float8_e4m3fn)), None),
    (CUDA, "TMA", lambda: ask_global(matrix(1030, 1536, torch.float8_e4m3fn)), None),
    (CUDA, "no rows", lambda: ask(matrix(0)), None),
    (CUDA, "no rows", lambda: ask_global(matrix(0)), None),
    (CUDA, r"2\^32 block scales", lambda: ask(matrix(2**20 + 1, 65536)), None),
    (CUDA, r"2\^31 .* do_shuffle", lambda: ask(matrix(2**25, 1088), do_shuffle=True), None),
    (CUDA, "Give a float", lambda: ask(scale=ONE), None),
    (CUTE_DSL, 'build="cute-dsl", not of cuda', lambda: ask(), None),
    (CUTE_DSL, f"set {NEW}=1", lambda: ask(build="cute-dsl", fast_math=False), None),
    (CUTE_DSL, f"set {NEW}=1", lambda: ask(build="cute-dsl", fast_math=False), "old exact"),
    (CUTE_DSL, f"unset {NEW}$", lambda: ask(build="cute-dsl", fast_math=True), "exact"),
    (
        CUTE_DSL,
        "expanded_idx",
        lambda: ask(build="cute-dsl", expanded_idx_to_permuted_idx=INDEX),
        None,
    ),
    (CUTE_DSL, "a row", lambda: ask_global(scale=ROWS, build="cute-dsl"), None),
    (CUTE_DSL, "no rows", lambda: ask(matrix(0), build="cute-dsl"), None),
    (CUTE_DSL, "multiple of 16 bytes", lambda: ask(misaligned(4), build="cute-dsl"), None),
    (
        CUTE_DSL,
        r"2\^31 elements",
        lambda: ask_global(matrix(851456, 2688), build="cute-dsl"),
        None,
    ),
    (CUTE_DSL, r"2\^31 block", lambda: ask(matrix(2**25 - 127, 1040), build="cute-dsl"), None),
    (
        CAKE,
        "sm_120 has no kernels; sm_100 and sm_103 have",
        lambda: ask(build="cute-dsl", capability=(12, 0)),
        None,
    ),
    (CAKE, 'build="cute-dsl", not of cuda', lambda: ask(), None),
    (CAKE, "fast math only", lambda: ask(build="cute-dsl", fast_math=False), None),
    (CAKE, "fast math only", lambda: ask(build="cute-dsl"), "exact"),
    (CAKE, "per-token only", lambda: ask_global(build="cute-dsl"), None),
    (CAKE, "no 4over6", lambda: ask(build="cute-dsl", nvfp4_4over6=FOUR_448), None),
    (CAKE, "layout_128x4 only", lambda: ask(build="cute-dsl", sfLayout=1), None),
    (CAKE, "layout_128x4 only", lambda: ask(build="cute-dsl", sfLayout=2), None),
    (CAKE, "without do_shuffle", lambda: ask(build="cute-dsl", do_shuffle=True), None),
    (
        CAKE,
        "expanded_idx",
        lambda: ask(build="cute-dsl", expanded_idx_to_permuted_idx=INDEX),
        None,
    ),
    (CAKE, "enable_pdl=False", lambda: ask(build="cute-dsl", enable_pdl=False), None),
    (CAKE, "no rows", lambda: ask(matrix(0), build="cute-dsl"), None),
    (CAKE, "K is 65552", lambda: ask(matrix(1, 65552), build="cute-dsl"), None),
    (CAKE, "multiples of 16 bytes", lambda: ask(misaligned(4), build="cute-dsl"), None),
    (CAKE, "of 16 bytes", lambda: ask(matrix(128, 68)[:, :64], build="cute-dsl"), None),
    (CAKE, r"2\^31 block", lambda: ask(matrix(2**25 - 127, 1040), build="cute-dsl"), None),
    (CAKE, "lacks the sources", lambda: ask(build="cute-dsl"), "no cake"),
]
PATCHES = {
    "absent": lambda m: pretend(m, version=None),
    "older": lambda m: pretend(m, version=(0, 6, 18)),
    "newer": lambda m: pretend(m, version=(0, 7, 9)),
    "unknown": lambda m: pretend(m, version=()),
    "no cake": lambda m: pretend(m, has_cake_programs=False),
    "compiling": lambda m: m.setattr(torch.compiler, "is_compiling", lambda: True),
    "exact": lambda m: [m.setenv(name, "1") for name in (NEW, OLD)],
    "old exact": lambda m: m.setenv(OLD, "1"),
    None: lambda m: None,
}


def refusing_rule(backend, request):
    """The place in the table of the rule that refuses."""
    return next(i for i, rule in enumerate(fi.RULES[backend]) if rule.refuses(request))


@pytest.mark.parametrize(("backend", "reason", "make", "patch"), REFUSED)
def test_refusal(usable, monkeypatch, backend, reason, make, patch):
    PATCHES[patch](monkeypatch)
    request = make()
    text = fi.refusal(backend, request)
    assert text is not None, f"{backend} would serve what it cannot"
    assert "{" not in text, f"a field was not filled in: {text}"
    assert re.search(reason, text), text


def test_every_rule_is_triggered(usable):
    triggered = set()
    for backend, _, make, patch in REFUSED:
        with pytest.MonkeyPatch.context() as m:
            PATCHES[patch](m)
            triggered.add((backend, refusing_rule(backend, make())))
    table = {(backend, i) for backend, rules in fi.RULES.items() for i in range(len(rules))}
    missing = [(b, fi.RULES[b][i].reason) for b, i in sorted(table - triggered)]
    assert not missing, f"rules without a case: {missing}"


SERVED = [
    *((CUDA, lambda c=c: ask(capability=c)) for c in ((10, 0), (10, 3), (11, 0), (12, 0), (12, 1))),
    (CUDA, lambda: ask(nvfp4_4over6=FOUR_448)),
    (CUDA, lambda: ask(expanded_idx_to_permuted_idx=INDEX)),
    (CUDA, lambda: ask(scale=torch.full((1,), G))),
    (CUDA, lambda: ask(matrix(64, 16, torch.float16), sfLayout=2)),
    (CUDA, lambda: ask(matrix(1, 64))),
    (CUDA, lambda: ask(matrix(64, 1).t())),
    (CUDA, lambda: ask(misaligned(16))),
    (CUDA, lambda: ask(matrix(2**20, 65536), sfLayout=2)),
    (CUDA, lambda: ask(matrix(2**25, 1024), do_shuffle=True)),
    (CUDA, lambda: ask_global(scale=ROWS)),
    (CUDA, lambda: ask_global(scale=ONE)),
    (CUDA, lambda: ask_global(matrix(dtype=torch.float8_e4m3fn))),
    (CUDA, lambda: ask_global(misaligned(16, torch.float8_e4m3fn))),
    (CUDA, lambda: ask_global(matrix(1023, 512, torch.float8_e4m3fn))),
    (CUDA, lambda: ask_global(matrix(1024, 528, torch.float8_e4m3fn))),
    (CUDA, lambda: ask_global(matrix(1024, 512))),
    (CUTE_DSL, lambda: ask_global(matrix(1024, 512, torch.float8_e4m3fn), build="cute-dsl")),
    (CUTE_DSL, lambda: ask(build="cute-dsl", capability=(12, 0))),
    (CUTE_DSL, lambda: ask(build="cute-dsl", out_scale=ONE, do_shuffle=True)),
    (CUTE_DSL, lambda: ask(scale=ONE, build="cute-dsl", nvfp4_4over6=FOUR_448)),
    (CUTE_DSL, lambda: ask_global(matrix(0), build="cute-dsl")),
    (CUTE_DSL, lambda: ask_global(matrix(64, 128).t(), build="cute-dsl")),
    (CUTE_DSL, lambda: ask(matrix(851456, 2688), build="cute-dsl")),
    (CUTE_DSL, lambda: ask_global(matrix(2**20, 2048), build="cute-dsl")),
    (CAKE, lambda: ask(build="cute-dsl", out_scale=ONE, scale=ONE)),
    (CAKE, lambda: ask(matrix(16, 65536), build="cute-dsl", capability=(10, 3))),
    (CAKE, lambda: ask(matrix(128, 128)[:, :64], build="cute-dsl")),
]


@pytest.mark.parametrize(("backend", "make"), SERVED)
def test_served(usable, backend, make):
    assert fi.refusal(backend, make()) is None


@pytest.mark.parametrize("old", [True, False])
def test_math_follows_the_variables_that_each_build_reads(usable, monkeypatch, old):
    monkeypatch.setenv(OLD if old else NEW, "1")
    assert ask().recipe.math == "exact" and fi.refusal(CUDA, ask()) is None
    request = ask(build="cute-dsl")
    assert request.recipe.math == ("fast" if old else "exact")
    assert fi.refusal(CUTE_DSL, request) is None
