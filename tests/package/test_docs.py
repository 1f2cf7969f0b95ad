"""The README and the pages of docs/: links lead somewhere, and every Python block runs."""

# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import checkpoint_cases
import pytest
import quick_start
import torch
from checkpoint_cases import MODELOPT_KINDS
from convert_cases import QWEN
from pages import python_blocks
from paths import ROOT
from torch import distributed

import nvfp4_moe
from nvfp4_moe import (
    Recipe,
    Routing,
    RoutingMethodType,
    nvfp4_quantize,
    prepare_experts,
    register_backend,
)
from nvfp4_moe.reference.moe.routing import route

OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*OUTSIDE, *sorted((ROOT / "docs").glob("*.md"))]
OPTIONAL = {"transformers": "make test-transformers"}
"""Packages that the tests' environment may lack, and what runs the pages that import them."""
LINK = re.compile(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)")


def _masked() -> dict:
    """The weights of masked input's page: codes arrive with a padded width, here the width itself."""
    return {"w13": torch.randn(4, 256, 128).bfloat16(), "w2": torch.randn(4, 128, 128).bfloat16()}


def _id(page: Path) -> str:
    return page.name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_links_lead_to_files(page):
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_names_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if page.name not in text] == []


def test_the_site_has_every_page():
    """`make docs` would say so, but it needs packages that the tests do without."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = re.findall(r"^ +- (?:\w+: )?(\w+\.md)$", text, re.M)
    outside = {"index.md", "contributing.md", "changelog.md"}
    assert sorted(nav) == sorted(outside | {page.name for page in PAGES[len(OUTSIDE) :]})


def test_the_reference_of_the_api_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"(?:^::: |`)nvfp4_moe\.(\w+)", text, re.M)
    assert sorted(set(nvfp4_moe.__all__) - set(named)) == ["__version__"]


@pytest.fixture
def introduced(tmp_path, monkeypatch):
    """The tensors, the folder and the process group that the pages use without making them."""
    monkeypatch.chdir(tmp_path)
    registered = []

    def register(*args, **kwargs):
        registered.append(register_backend(*args, **kwargs))
        return registered[-1]

    monkeypatch.setattr("nvfp4_moe.register_backend", register)
    weights = checkpoint_cases.weights()
    quantized = checkpoint_cases.quantized(weights)
    for projection in quantized.values():
        projection["input"] = torch.full((checkpoint_cases.EXPERTS,), 0.01, dtype=torch.float32)
    folder = tmp_path / "path" / "to" / "checkpoint"
    folder.parent.mkdir(parents=True)
    checkpoint_cases.write(
        folder,
        [checkpoint_cases.nvfp4(QWEN, 3, quantized, MODELOPT_KINDS)],
        dict(QWEN.config),
        hf_quant_config=checkpoint_cases.modelopt_config(),
    )

    def my_kernel(a, scale, layout):
        return nvfp4_quantize(a, scale, layout, per_token_activation=True, backend="reference")

    w13, w2 = weights.w13.bfloat16(), weights.down.bfloat16()
    experts = prepare_experts(w13, w2)
    torch.manual_seed(0)
    x, logits = torch.randn(8, w13.shape[2]).bfloat16(), torch.randn(8, w13.shape[0])
    routing = Routing(RoutingMethodType.Renormalize, top_k=2)
    chosen = route(logits, routing)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/g", rank=0, world_size=1)
    try:
        yield {
            **{"x": x, "logits": logits, "router_logits": logits, "recipe": Recipe()},
            **{"w13": w13, "w2": w2, "new_w13": w13 / 2, "new_w2": w2, "my_kernel": my_kernel},
            **{"experts": experts, "server_experts": prepare_experts(w13, w2), "routing": routing},
            **{
                "trainers": prepare_experts(w13 / 2, w2).checksum(),
                "ids": chosen.ids,
                "weights": chosen.weights_bf16,
                "scale": torch.tensor(1.0),
            },
            "received": torch.randn(4, 8, 128).bfloat16(),
            "masked_m": torch.tensor([8, 0, 3, 5], dtype=torch.int32),
            **{"first": 0, "count": len(w13), "rank": 0, "ranks": 1},
        }
    finally:
        distributed.destroy_process_group()
        for backend in registered:
            backend.remove()


RUN = [page for page in PAGES if python_blocks(page.read_text("utf-8"))]


def test_blocks_are_found():
    assert {page.name for page in RUN} >= {"README.md", "serving.md", "own_backends.md"}


@pytest.mark.parametrize("page", RUN, ids=_id)
def test_python_blocks_run(page, introduced, capsys):
    """In order, in one namespace; what a README block prints is what the page shows."""
    if page.name == "masked_input.md":
        introduced |= _masked()
    blocks = python_blocks(page.read_text(encoding="utf-8"))
    for package, how in OPTIONAL.items():
        if any(re.search(rf"^(import|from) {package}\b", block, re.MULTILINE) for block in blocks):
            pytest.importorskip(package, reason=f"the page needs {package} ({how})")
    for block in blocks:
        exec(compile(block, page.name, "exec"), introduced)
    if page.name == "README.md":
        printed = capsys.readouterr().out.splitlines()
        shown = page.read_text(encoding="utf-8").splitlines()
        assert [line for line in printed if line not in shown] == []


def test_the_quick_start_runs_twice_in_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        quick_start.main(tmp_path / "out")
        said = capsys.readouterr().out
        assert "the server and the trainer agree to the bit" in said
        assert said.endswith(f"toy, toy-nvfp4, mine.safetensors are in {tmp_path / 'out'}\n")
