"""The loop of `examples/closed_loop.py` with a real vLLM, shortened; `make server-test` runs it.

The program itself raises where the sampler's experts are not the trainer's after a reload, where a
sampler that was reloaded differs from a new one, and where the recorded routes belong to other bytes.
"""

# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

pytest.importorskip("vllm", reason="vllm is not installed (make server-test)")
from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("this vllm is no CPU build (make server-test)", allow_module_level=True)

SIZES = {"learn": 5, "reinforce": 2, "texts": 4, "length": 6, "least": 20_000}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    result = tmp_path_factory.mktemp("loop") / "loop.json"
    program = ROOT / "examples" / "closed_loop.py"
    options = [part for name, size in SIZES.items() for part in (f"--{name}", str(size))]
    subprocess.run(
        [sys.executable, program, "--sampler", "vllm", "--json", result, *options],
        env=os.environ | {"FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH": "1"},
        timeout=1800,
        check=True,
    )
    return json.loads(result.read_text(encoding="utf-8"))


def test_the_experts_of_vllm_and_of_the_trainer_have_the_same_bits(found):
    assert len(found["same inputs"]) == 2 + 7
    for line in found["same inputs"][2:]:
        compared, differ = (int(c.replace(",", "")) for c in line.rstrip(" |").split(" | ")[2:])
        assert compared >= SIZES["least"] and differ == 0, line


def test_vllms_recorder_sees_the_routes_through_the_plug_in(found):
    (line,) = found["routes"]
    places = SIZES["texts"] * (16 + SIZES["length"] - 1) * 2 * 8
    assert f"of {places:,} without replay, 0 with it" in line


def test_log_probabilities_are_closer_with_the_samplers_arithmetic(found):
    """vLLM's other operations are not the trainer's, so that none of the rows is 0."""
    rows = {(r["trainer"], r["sampler"]): r for r in found["plain"] + found["fake-quantized"]}
    samplers = {"bf16", "static", "per token", "4over6 per token", "W4A16"}
    assert {s for t, s in rows if t == "bf16"} == samplers
    for row in rows.values():
        assert row["sampled"] == SIZES["texts"] * SIZES["length"] and 0 < row["kl"] < 0.1, row
    plain = {r["sampler"]: r["kl"] for r in found["plain"]}
    assert all(plain["bf16"] < plain[name] for name in samplers - {"bf16"}), plain
    ours, theirs = (rows[name, "per token"]["kl"] for name in ("ours", "bf16"))
    assert ours < theirs
