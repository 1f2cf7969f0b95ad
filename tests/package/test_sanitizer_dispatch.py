"""Racecheck's reports of Triton's dispatch of `gl.warp_specialize`, told from every other race."""

# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import replace

import pytest
import torch
import triton
from offline import compile_kernel, disassemble, tensor_descriptor
from sanitizer import __main__ as command
from sanitizer import dispatch, outcome, planted, worker

from nvfp4_moe.kernels.moe.hopper.config import refusal

KERNEL = "moe.hopper.grouped_gemm.expert_gemm_kernel"
# A part of what Triton 3.6.0's `nvdisasm` prints for `specialize_kernel`, compiled for sm_90.
DISPATCHED = """\
        /*00f0*/              @!P1 BRA `(.L_x_1) ;
        /*0100*/                   BAR.SYNC.DEFER_BLOCKING 0x1 ;
        /*0110*/                   LDS.U8 R2, [R0+UR4+0x4] ;
        /*0120*/                   ISETP.GT.U32.AND P1, PT, R2, 0x3, PT ;
        /*0130*/              @!P1 BRA `(.L_x_2) ;
        /*0140*/                   BAR.SYNC.DEFER_BLOCKING 0x1 ;
        /*0150*/                   BAR.SYNC.DEFER_BLOCKING 0x1 ;
        /*0410*/                   STS [UR4+0x8], R0 ;
        /*0420*/                   BAR.SYNC.DEFER_BLOCKING 0x1 ;
        /*0470*/                   BAR.SYNC.DEFER_BLOCKING 0x1 ;
        /*04b0*/              @!P0 STG.E desc[UR6][R2.64], R5 ;
        /*04c0*/                   BAR.SYNC.DEFER_BLOCKING 0x1 ;
        /*0550*/                   STS [UR4+0x8], R0 ;
        /*0560*/                   BAR.SYNC.DEFER_BLOCKING 0x1 ;
"""
DISPATCH = dispatch.Dispatch("specialize_kernel", 0x110, (0x410, 0x550))
OF_DISPATCH = """\
========= Error: Race reported between Read access at specialize_kernel+0x110 in reproducer.py:25
=========     and Write access at specialize_kernel+0x410 in reproducer.py:25 [66 hazards]
=========     and Write access at specialize_kernel+0x550 in reproducer.py:26 [81 hazards]
========= \n"""
serves = pytest.mark.skipif(refusal(90) is not None, reason=str(refusal(90)))
READ, AWAIT = "LDS.U8 R2, [R0+UR4+0x4] ;", "BAR.SYNC.DEFER_BLOCKING 0x1 ;"


def test_the_dispatch_is_found_in_machine_code():
    assert dispatch.find("specialize_kernel", DISPATCHED, 4) == DISPATCH
    assert dispatch.parse(str(DISPATCH)) == DISPATCH


@pytest.mark.parametrize(
    "old,new",
    [
        (f"{AWAIT}\n        /*0110*/", "NOP ;\n        /*0110*/"),  # no barrier before the read
        (f"/*0140*/                   {AWAIT}", f"/*0140*/  STS [R9], R3 ;\n /*0144*/ {AWAIT}"),
        (f"/*0420*/                   {AWAIT}", "/*0420*/  LDS R3, [R9] ;"),
        (f"/*0560*/                   {AWAIT}", "/*0560*/  EXIT ;"),
        (f"/*0100*/                   {AWAIT}", "/*0100*/  BAR.SYNC.DEFER_BLOCKING 0x1, 0x80 ;"),
        (READ, "LDS.U8 R2, [R0+UR4+0x5] ;"),  # another address than the writes
        ("/*0550*/                   STS", "/*0550*/                   STS.U8"),
        # A copy to shared memory between the barrier and the read.
        (READ, f"LDGSTS.E.BYPASS.128 [R9], desc[UR6][R2.64] ;\n        /*0118*/  {READ}"),
    ],
)
def test_a_dispatch_without_its_barriers_is_none(old, new):
    assert old in DISPATCHED
    assert dispatch.find("specialize_kernel", DISPATCHED.replace(old, new), 4) is None


FORMS = {"only": "*i32", "registers": "*i32", "barriers": "*i32", "ring": "*fp32"}
"""The type of y in each form of the reproducer."""


def compiled_form(name: str):
    from sanitizer.reproducer import FORMS

    form, rows = FORMS[name], tensor_descriptor("bf16", (8, 64), 128)
    given = {"x_desc": rows, "turns": "i32", "y_ptr": globals()["FORMS"][name]}
    return compile_kernel(form.kernel, 90, given, dict(form.constants), [], **form.options)


@serves
@pytest.mark.compile
@pytest.mark.parametrize("name", FORMS)
def test_triton_dispatches_behind_barriers(name, monkeypatch, capsys, tmp_path):
    """Each form has what it is named after, and the worker says where its dispatch is."""
    from sanitizer import reproducer

    assert list(reproducer.FORMS) == list(FORMS)
    form, compiled = reproducer.FORMS[name], compiled_form(name)
    found = dispatch.of(compiled)
    assert found and found.kernel == form.kernel.fn.__name__ and found.read < min(found.writes)
    code = disassemble(compiled, tmp_path)
    accesses = re.findall(r"\b(?:ld|st|atom)\.shared", compiled.asm["ptx"])
    assert (len(accesses) == 3) == (name != "ring")  # shared memory of the dispatch alone
    assert ("USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0x100" in code) == (name == "only")
    of_default_warps = re.findall(r"BAR\.SYNC\S* 0x0, 0x", code)
    assert bool(of_default_warps) == (name in ("barriers", "ring"))
    assert ("UTMALDG" in code) == ("SYNCS" in code) == (name == "ring")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(triton.JITFunction, "run", lambda kernel, *args, **options: compiled)
    monkeypatch.setattr(reproducer, "FORMS", {name: replace(form, arguments=lambda device: ())})
    worker.main(["--reproducer", name])
    told = capsys.readouterr().out
    assert f"sanitizer: done {name}\n" in told and f"\nsanitizer: dispatch {found}\n" in told


@serves
def test_a_form_is_launched_as_it_is_compiled(monkeypatch):
    """Arguments and constants are those of the kernel, in its order."""
    from sanitizer import reproducer

    calls = []
    monkeypatch.setattr(
        triton.JITFunction, "run", lambda kernel, *args, **options: calls.append((args, options))
    )
    for name, form in reproducer.FORMS.items():
        form.launch("cpu")
        given, options = calls.pop()
        constants = {k: v for k, v in options.items() if k in form.kernel.arg_names}
        assert len(given) + len(constants) == len(form.kernel.arg_names)
        assert constants == form.constants and options["grid"] == (reproducer.PROGRAMS,)
        assert given[-1] == reproducer.TURNS if name == "ring" else given[0].numel() == 2, name


@pytest.mark.compile
def test_a_kernel_without_partitions_has_no_dispatch():
    constants = {"SIZE": 128}
    other = compile_kernel(planted.beyond_kernel, 90, {"y_ptr": "*i32"}, constants, [])
    assert dispatch.of(other) is None


def race_of(text: str, reports: int) -> str:
    """Return the output of a process under racecheck that has launched the reproducer."""
    return (
        f"========= COMPUTE-SANITIZER\nsanitizer: cases 1\n{text}sanitizer: done it\n"
        f"sanitizer: launched {KERNEL}\nsanitizer: dispatch {DISPATCH}\n"
        f"========= RACECHECK SUMMARY: {reports} hazards displayed ({reports} errors, 0 warnings)\n"
    )


def judged(text: str, *, accepted: bool = True):
    return outcome.judge("racecheck", "ring 8", text, 0, 1.0, {KERNEL}, 240, accepted=accepted)


def test_reports_of_the_dispatch_are_counted_apart():
    found = judged(race_of(OF_DISPATCH * 3, 3))
    assert (found.verdict, found.known, found.errors, found.shown) == ("clean", 3, 0, "3 known")
    assert found.first == ""
    one_write = "".join(OF_DISPATCH.splitlines(keepends=True)[:2])
    assert judged(race_of(one_write, 1)).known == 1
    refused = judged(race_of(OF_DISPATCH * 3, 3), accepted=False)
    assert (refused.verdict, refused.known, refused.shown) == ("errors", 0, "3 errors")
    assert "Read access at specialize_kernel+0x110" in refused.first


@pytest.mark.parametrize(
    "old,new",
    [
        ("Read access", "Write access"),
        ("kernel+0x110", "kernel+0x120"),  # another read
        ("and Write access at specialize_kernel+0x550", "and Read access at specialize_kernel+0x550"),
        ("+0x550", "+0x560"),  # another write beside one of the dispatch
        ("specialize_kernel+0x110", "other_kernel+0x110"),
        ("reproducer.py:26 [81 hazards]", "a.py:1 [1 hazards]\n=========     and Read access at ?"),
    ],
)  # fmt: skip
def test_another_race_is_an_error(old, new):
    assert old in OF_DISPATCH
    found = judged(race_of(OF_DISPATCH + OF_DISPATCH.replace(old, new), 2))
    assert (found.verdict, found.errors, found.known) == ("errors", 1, 0)
    assert found.first.startswith("Error: Race reported between ")


def test_a_report_that_was_not_printed_is_an_error():
    assert judged(race_of(OF_DISPATCH, 2)).verdict == "errors"
    many = outcome.PRINTED
    assert judged(race_of(OF_DISPATCH * many, many)).verdict == "errors"
    assert str(many) in command.command("here", "racecheck", "--print-limit")
