"""Every subcommand and its options, as data: both parsers and the help are made from it.

Nothing here imports torch, so that `--help` and a misspelt option are answered at once. Choices that are
keys of a table elsewhere stand here, too; `tests/package/test_command_line.py` compares them with the
table.
"""

# SPDX-License-Identifier: Apache-2.0
import math

from .declaration import Command, Option

PARTS = ("quantizers", "moe", "baselines")
"""The names in `report/parts.py`, PARTS."""
RENAMED_PARTS = {"siblings": "baselines"}
"""Names that parts had in release 0.1, and the names that they have now."""
RECIPES = ("all", "plain", "4over6", "fast", "exact")
"""The keys of `cases/quantize.py`, RECIPES."""
KINDS = ("normal", "heavy", "grid", "sparse", "bits", "edge")
"""The kinds of `cases/inputs.py`."""
LAYERS = ("few", "small", "large")
"""The keys of `cases/moe.py`, SETS."""
FLASHINFER_VERSIONS = ("0.7.2", "0.7.4")
"""Those of `reference/recipe.py`; the first is its default."""
ROUTINGS = (
    "Default",
    "Renormalize",
    "DeepSeekV3",
    "Llama4",
    "RenormalizeNaive",
    "TopK",
    "SigmoidRenorm",
    "MiniMax2",
    "Sigmoid",
    "TopKSigmoid",
)
"""The methods of `reference/moe/routing.py`."""
BUILDS = ("cuda", "cute-dsl", "cutlass")
"""Those of `reference/recipe.py`, LayerBuild."""
MEASURED = ("quantize", "dense", "moe", "convert", "load")
"""The keys of `bench/operations.py`, OPERATIONS."""
CONVERSIONS = (
    "exact",
    *(
        f"exact-4over6-{e4m3_max}-{mode}"
        for e4m3_max in (448, 256)
        for mode in ("mae", "mae-fasterr", "mse", "mse-fasterr")
    ),
)
"""The keys of `cli/convert.py`, RECIPES."""

_DIFF = Command(
    "diff",
    ".cli.diff",
    "compare the same tensors through every backend here, to the bit",
    "Quantize the same tensors by every backend that works here, and compare codes, block scales and "
    "per-token scales to the bit. Then compare the fused mixture of experts, and FlashInfer's BF16, FP8 "
    "and MXFP8 layers where it serves them. A recipe without 4over6 is compared in all three layouts of "
    "block scales, one with 4over6 in one of them. A backend or a tensor that you name counts as not "
    "run if it takes part in no comparison.",
    (
        Option(
            "--input",
            "a safetensors file of your own tensors, [M, K] with K a multiple of 16",
            metavar="FILE",
        ),
        Option("--backends", "the backends, comma-separated; all that work here if not given"),
        Option(
            "--backend",
            "also compare a backend of your own: module:function, a function as `register_backend` "
            "takes it, for the operation that --only names",
            metavar="NAME",
            repeated=True,
        ),
        Option("--recipes", "the recipes of the quantizers", default="all", choices=RECIPES),
        Option(
            "--flashinfer",
            "the version of FlashInfer whose bits are expected; it need not be installed",
            default=FLASHINFER_VERSIONS[0],
            choices=FLASHINFER_VERSIONS,
        ),
        Option("--kind", "only this kind of synthetic input", choices=KINDS),
        Option("--seed", "the seed of the synthetic inputs", int, 0),
        Option("--rows", "at most this many rows of each tensor", int),
        Option("--only", "compare this part alone", choices=PARTS, earlier=RENAMED_PARTS),
        Option(
            "--every-configuration",
            "run the mixture of experts in every tactic that a backend lists",
            bool,
        ),
        Option("--replay", "run the mixture of experts in CUDA graphs, too", bool),
        Option(
            "--layers",
            "the set of layers of the mixture of experts; large takes too long without a GPU",
            default="small",
            choices=LAYERS,
        ),
        Option(
            "--report", "write report.html, report.json and each failing case to DIR", metavar="DIR"
        ),
    ),
    (
        ("diff", "everything that this machine can compare"),
        ("diff --input mine.safetensors --report out", "your own tensors, and a page in out/"),
        ("diff --only moe --backends triton", "one backend of one part"),
    ),
)
_BLACKWELL = Command(
    "blackwell",
    ".cli.blackwell",
    "run the whole matrix through every backend, tactic and math",
    "Run the whole matrix through every backend of this machine, FlashInfer's with every tactic that it "
    "advertises, in fast and exact math, with 4over6, and replayed in CUDA graphs; write the report; "
    "end with a table of verdicts. Named backends of which nothing was judged count as not run; where "
    "none are named, so does FlashInfer if none of its backends was.",
    (
        Option("--report", "the folder of the report", default="report", metavar="DIR"),
        Option("--backends", "the backends, comma-separated; all if not given"),
        Option("--small", "run a small part, to see that it runs", bool),
        Option("--timeout", "the time limit of one process, in seconds", float, 3600.0, "SECONDS"),
        Option(
            "--resume",
            "take the processes that ended well in an earlier run into DIR, by the same files of the "
            "package, options and machine",
            bool,
        ),
    ),
    (
        ("blackwell --small", "a part of it, to see that it runs"),
        ("blackwell --resume", "go on after an interruption"),
        ("blackwell --report out --backends triton", "one backend, its page in out/"),
    ),
)
_REPLAY = Command(
    "replay",
    ".cli.replay",
    "run a failing case from a file again",
    "Run the failing case of a file again, both sides of a comparison or a fused call's backend, and "
    "print the first difference. A backend that cannot run here counts as not run.",
    (
        Option("file", "a failing case, which a comparison wrote", metavar="FILE"),
        Option(
            "--backend",
            "run this backend in the place of the one that failed; also module:function, as for diff",
        ),
    ),
    (
        ("replay out/failures/case.safetensors", "the case again, as it failed"),
        ("replay case.safetensors --backend reference", "the case in another backend"),
    ),
)
_DOCTOR = Command(
    "doctor",
    ".cli.doctor",
    "say what is here, and which backend would serve",
    "Say what is here: GPUs, versions, each backend usable or why not, the environment variables that "
    "matter, and on a GPU whether its rcp table is the known one and its sums as assumed.",
    (),
    (
        ("doctor", "what this machine has, and what would mend the rest"),
        ("doctor --json", "the same for a bug report"),
    ),
)
_EXPLAIN = Command(
    "explain",
    ".cli.explain",
    "say which backend would serve a layer of a shape, and why",
    "Say which backend would serve a fused layer and its quantizer on a GPU, and why each other would "
    "not. Nothing is computed, and the GPU need not be here. Without --gpu it is this machine's; a "
    "machine without one gets a table of all.",
    (
        Option("--gpu", "a compute capability, as sm_90 or sm_100", metavar="SM"),
        Option("--tokens", "the number of tokens, which are rows of the input", int, 16),
        Option("--hidden", "the hidden size", int, 2048),
        Option("--intermediate", "the intermediate size of an expert", int, 768),
        Option("--experts", "the number of experts", int, 128),
        Option("--top-k", "the number of experts of a token", int, 8),
        Option("--activation", "the activation of the experts", default="Swiglu"),
        Option("--routing", "the routing method", default="Renormalize", choices=ROUTINGS),
        Option(
            "--build",
            "FlashInfer's implementation whose bits are wanted",
            default="cuda",
            choices=BUILDS,
        ),
        Option(
            "--math",
            "the arithmetic of the quantizers; as the environment says if not given",
            choices=("fast", "exact"),
        ),
        Option("--four-over-six", "quantize with 4over6", bool),
        Option("--batch-invariant", "require that a token's bits depend on no other token", bool),
    ),
    (
        ("explain", "Qwen3-30B-A3B's layer on this GPU, or on every kind of GPU"),
        (
            "explain --gpu sm_100 --hidden 7168 --experts 32",
            "32 experts of 7168 x 768 on Blackwell",
        ),
    ),
)
_FUZZ_BOUNDS = Command(
    "fuzz-bounds",
    ".cli.fuzz_bounds",
    "judge random runs that keep the contract",
    "Draw calls of the fused layer, of the layer over ranks and of the dense product over the whole "
    "range of fp32, run each in ways that keep the contract, and judge the outputs by the proved "
    "intervals. A difference is an output outside of its interval.",
    (
        Option("--seed", "the first call's", int, 0),
        Option("--runs", "at least as many", int, 300),
        Option(
            "--seconds",
            "the time limit of each process, in seconds; none if not given",
            float,
            math.inf,
            "SECONDS",
        ),
        Option("--tokens", "rows of a call", int, 4),
        Option("--ways", "runs of a call by the reference", int, 3),
        Option("--kinds", "the number of kinds of calls, which kernels are compiled for", int),
        Option("--device", "where to run", default="cpu", choices=("cpu", "cuda")),
        Option("--triton", "run our kernels, too", bool),
        Option("--processes", "at a time", int, 1),
    ),
    (
        ("fuzz-bounds", "300 runs"),
        ("fuzz-bounds --seed 7 --runs 1", "one call again"),
    ),
)
_CONVERT = Command(
    "convert",
    ".cli.convert",
    "quantize the experts of a Hugging Face checkpoint",
    "Write an NVFP4 checkpoint, as ModelOpt does, from a bf16, fp16, fp32 or FP8 one: the weights of "
    "its experts are quantized, all else is copied. Called again after an interruption it goes on where "
    "it stopped. Prints the error of each layer.",
    (
        Option("source", "the folder of a checkpoint", metavar="SRC"),
        Option("destination", "a new folder", metavar="DST"),
        Option("--recipe", "how to quantize", default="exact", choices=CONVERSIONS),
        Option(
            "--exclude",
            "a module of experts that stays as it is, with wildcards (model.layers.61.*)",
            metavar="PATTERN",
            repeated=True,
        ),
        Option(
            "--no-input-scale",
            "leave out the activation scales, which are written as 1.0, not calibrated",
            bool,
        ),
        Option(
            "--device",
            "where to quantize: cpu with every core, cuda with every GPU, or one, as cuda:1",
            default="cpu",
        ),
    ),
    (
        ("convert Qwen3-30B-A3B Qwen3-30B-A3B-NVFP4", "on the CPU"),
        (
            "convert SRC DST --device cuda --exclude 'model.layers.61.*'",
            "on every GPU, but for a layer",
        ),
    ),
)
_BENCH = Command(
    "bench",
    ".cli.bench",
    "measure the speed of this machine, beside a baseline",
    "Measure quantizers, products and the mixture of experts in every backend that serves here: the "
    "time of a call by the device's clock, GB/s, TFLOP/s, the share of the roofline that a copy and a "
    "product set in the same run, and the ratio to a baseline. On a CPU it measures the reference, "
    "conversion and loading. A backend that was named and cannot run here counts as not run, and a "
    "wrong output as a difference.",
    (
        Option(
            "--only",
            "measure this operation alone; repeat it for another",
            choices=MEASURED,
            repeated=True,
        ),
        Option(
            "--shape",
            "measure shapes whose name contains TEXT; repeat it for others",
            repeated=True,
        ),
        Option("--tokens", "measure inputs of N rows; repeat it for others", int, repeated=True),
        Option(
            "--backend",
            "measure this backend; repeat it for another",
            repeated=True,
            metavar="NAME",
        ),
        Option(
            "--all", "measure every shape, number of tokens and backend, where you name none", bool
        ),
        Option("--device", "where to measure; a GPU if there is one"),
        Option(
            "--baseline",
            "the backend that others are compared with; copy_ and torch's bf16 layers if not given",
            metavar="NAME",
        ),
        Option("--save", "write the times as `pytest bench --benchmark-json` does", metavar="FILE"),
        Option(
            "--load",
            "measure nothing, and take the times of FILE; repeat it for another",
            metavar="FILE",
            repeated=True,
        ),
        Option(
            "--compare",
            "show the speed-up over the times of FILE, which --save wrote",
            metavar="FILE",
        ),
        Option(
            "--plot", "draw roofline.svg and speedup.svg in DIR; needs matplotlib", metavar="DIR"
        ),
    ),
    (
        ("bench", "the usual cases, in under a minute on a CPU"),
        ("bench --only moe --all --save moe.json --plot plots", "every layer, kept and drawn"),
        ("bench --only moe --shape qwen3 --tokens 1 --tokens 128", "two cases of one layer"),
        ("bench --compare moe.json", "this machine now, beside an earlier run"),
    ),
)
_SOLUTIONS = Command(
    "solutions",
    ".cli.solutions",
    "write our layer for FlashInfer's own substitution hook",
    "Write definitions and solutions of the fused layer, as flashinfer-bench has them. FlashInfer's "
    "hook (flashinfer.trace_apply) then calls ours for calls of these shapes, in any server. The "
    "installed flashinfer-python names the definitions.",
    (
        Option("folder", "the folder to write", metavar="DIR"),
        Option(
            "--shape",
            "the shape of the weights with their padding: hidden and intermediate size, experts, top k, "
            "and the experts of a rank; repeat it for another layer",
            metavar="H,I,E,K[,LOCAL]",
            repeated=True,
            required=True,
        ),
        Option("--activation", "the activation of the layer", default="Swiglu"),
        Option(
            "--routing",
            "routing methods, comma-separated, or the word given for calls that bring their ids; all if "
            "not given",
        ),
        Option(
            "--groups",
            "the groups of DeepSeekV3's routing, and how many of them it takes",
            metavar="N,TOP",
        ),
    ),
    (
        (
            "solutions hook --shape 2048,768,128,8 --routing Renormalize",
            "Qwen3-30B-A3B's layer, into hook/",
        ),
    ),
)
COMMANDS = {
    command.name: command
    for command in (
        _DIFF,
        _BLACKWELL,
        _REPLAY,
        _DOCTOR,
        _EXPLAIN,
        _FUZZ_BOUNDS,
        _CONVERT,
        _BENCH,
        _SOLUTIONS,
    )
}
"""Every subcommand by its name, in the order of `--help`."""
