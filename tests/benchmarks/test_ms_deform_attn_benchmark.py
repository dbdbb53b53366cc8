"""The benchmark of deformable attention: its table, and what it does with a form that computes something else."""

import gc
import sys

import pytest
import torch

from benchmarks import ms_deform_attn as benchmark
from dimaskdino.layers import ms_deform_attn_ops
from dimaskdino.layers.ms_deform_attn_reference import ms_deform_attn_reference

pytestmark = pytest.mark.skipif(not ms_deform_attn_ops.COMPILED, reason="the benchmark measures the compiled op")


@pytest.fixture(autouse=True)
def _small_levels(monkeypatch):
    shapes = [(16, 16), (8, 8), (4, 4), (2, 2)]
    monkeypatch.setattr(benchmark, "SHAPES_1024", shapes)
    monkeypatch.setattr(benchmark, "TOKENS", sum(height * width for height, width in shapes))
    gc.freeze()  # each measurement collects garbage, which takes long among all modules of a test run
    yield
    gc.unfreeze()


def test_command_prints_a_row_for_each_case_dtype_and_pass(monkeypatch, capsys):
    package = {"torch-ms-deform-attn": benchmark.Form(ms_deform_attn_reference, fused=False, ours=False)}
    monkeypatch.setattr(benchmark, "_torch_ms_deform_attn", lambda: package)
    arguments = ["--device", "cpu", "--cases", "decoder 3", "decoder 5", "--dtypes", "float32", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["ms_deform_attn", *arguments])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    header = [cell.strip() for cell in lines[1].strip("|").split("|")]
    rows = [dict(zip(header, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in lines[3:]]
    assert [(row["case"], row["dtype"], row["pass"]) for row in rows] == [
        (case, "float32", passes) for case in ("decoder 3", "decoder 5") for passes in benchmark.PASSES
    ]
    for row in rows:
        assert row["grid_sample"] == "1.00x"
        forms = ("compiled", "softmax + compiled", "fused", "torch-ms-deform-attn")
        times = {form: float(row[form].removesuffix("x")) for form in forms}
        assert min(times.values()) > 0
        ratio = float(row["fused against the best package"].removesuffix("x"))
        fused, package = times["fused"], times["torch-ms-deform-attn"]
        half = 0.005 + 1e-9  # of the last digit that is printed
        assert (fused - half) / (package + half) - half <= ratio
        assert ratio * (package - half) <= fused + half + half * package


def doubled(*args):
    return 2 * ms_deform_attn_reference(*args)


def unable(*args):
    raise RuntimeError("no kernel for this architecture")


def measure(form):
    case = benchmark.make_case("decoder 3", torch.float32, torch.device("cpu"))
    return benchmark.measure(case, {"form": form}, torch.float32, "forward", 1)


def test_a_wrong_form_of_ours_ends_the_run():
    assert measure(benchmark.Form(ms_deform_attn_reference, fused=False)).keys() == {"form"}
    with pytest.raises(RuntimeError, match="decoder 3 torch.float32 forward: form: .* elements are wrong, by 1 of"):
        measure(benchmark.Form(doubled, fused=False))


def test_wrong_form_of_another_package_is_measured_and_reported(capsys):
    assert measure(benchmark.Form(doubled, fused=False, ours=False)).keys() == {"form"}
    assert "form: 768 of 768 elements are wrong, by 1 of the largest" in capsys.readouterr().err


def test_what_another_package_cannot_do_is_left_out(capsys):
    assert measure(benchmark.Form(unable, fused=False, ours=False)) == {}
    assert "without form: no kernel for this architecture" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="no kernel for this architecture"):
        measure(benchmark.Form(unable, fused=False))
