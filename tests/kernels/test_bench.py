import json

import pytest
import torch

from nvfp4check.cli import kernels_bench
from nvfp4check.cli.kernels_bench import bench as bench_command
from nvfp4check.cli.kernels_bench import predict_document
from nvfp4check.findings import CheckError
from nvfp4check.kernels import bench, cost
from nvfp4check.kernels.registry import LAUNCHERS
from nvfp4check.ops import OPERATIONS, resolve
from nvfp4check.report.formats import Format
from nvfp4check.report.render import render

CPU = torch.device("cpu")

#: Every operation at a size an interpreter can take; scales and pages fill whole tiles.
SMALL = [
    cost._workload("quantize", M=64, K=256),
    cost._workload("dequantize", M=64, K=256),
    cost._workload("swizzle", M=130, C=7),
    cost._workload("unswizzle", M=128, C=8),
    cost._workload("matmul", M=32, N=48, K=128),
    cost._workload("grouped_matmul", M=32, N=48, K=128, E=4),
    cost._workload("silu_mul_quantize", M=64, K=256),
    cost._workload("rms_norm_quantize", M=64, K=256),
    cost._workload("rope", T=16, H=4, R=64),
    cost._workload("route", T=16, E=256, k=8),
    cost._workload("mla_decode", B=2, H=4, S=128, L=512, R=64),
    cost._workload("dequantize_fp8_block", N=130, K=257),
]


def stored_bytes(values) -> int:
    return sum(
        value.numel() * value.element_size()
        for value in values
        if isinstance(value, torch.Tensor) and value.numel() > 1
    )


@pytest.mark.parametrize("workload", SMALL, ids=lambda workload: workload.operation)
def test_the_counted_bytes_are_those_of_the_inputs_and_outputs(workload):
    operation = OPERATIONS[workload.operation]
    inputs = bench.make_inputs(workload, CPU)
    kernel = resolve(LAUNCHERS[workload.operation])

    outputs = kernel(*inputs)

    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert len(outputs) == len(operation.outputs)
    moved = stored_bytes(inputs) + stored_bytes(outputs)
    uncounted = {
        "grouped_matmul": 4 * 4 + 5 * 4,  # alphas and offsets
        "mla_decode": 2 * 2 * 4 + 2 * 4,  # page numbers and lengths
        "rope": 16 * 8 - 16 * 64 * 4,  # positions; the launcher's own table is counted
    }
    assert workload.cost.bytes == moved - uncounted.get(workload.operation, 0)


def test_there_is_a_workload_for_every_operation_and_a_maker_for_each():
    assert {workload.operation for workload in cost.WORKLOADS} == OPERATIONS.keys()
    assert bench._MAKERS.keys() == OPERATIONS.keys()


def test_a_product_counts_two_operations_for_each_pair():
    assert cost.matmul(3, 5, 32).operations == 2 * 3 * 5 * 32
    assert cost.mla_decode(1, 1, 1, 512, 64).operations == 2 * (512 + 64) + 2 * 512


def test_the_limit_is_the_slower_of_memory_and_tensor_cores():
    moved = cost.Cost(1000, 10, cost.MatrixKind.NVFP4)

    assert cost.limit(moved, 100.0, 100.0) == cost.Limit(10.0, "memory")
    assert cost.limit(moved, 1000.0, 1.0) == cost.Limit(10.0, "tensor cores")


def test_hopper_multiplies_nvfp4_at_the_rate_of_sixteen_bit():
    h100, b200 = cost.CHIPS["H100"], cost.CHIPS["B200"]

    assert h100.matrix_rate(cost.MatrixKind.NVFP4) == h100.sixteen_bit
    assert b200.matrix_rate(cost.MatrixKind.NVFP4) == 4 * b200.sixteen_bit


def test_the_prediction_names_every_workload_and_chip_in_each_format():
    document = predict_document("quantize", ["B200", "H100"])

    assert json.loads(render(document, Format.JSON))["workloads"][0]["operation"] == "quantize"
    text = render(document, Format.TEXT)
    seconds = 16384 * 7168 * (2 + 9 / 16) / 7.7e12
    assert f"{seconds * 1e6:.1f} m" in text
    assert "H100 Tensor Core GPU data sheet" in text
    assert "| quantize" in render(document, Format.MARKDOWN)


def test_a_measured_document_shows_shares_and_verdicts():
    timing = bench.Timing("quantize", "M=1", "triton", 1e-4, 0.871, "memory", 2e12, 0.0)
    document = {
        "schema": "nvfp4check/bench/1",
        "predicted": False,
        "rates": {"gpu": "H100", "copy_bandwidth": 2.9e12, "matrix_rate": 7e14},
        "timings": [{name: getattr(timing, name) for name in timing.__slots__}],
        "refused": [],
        "correct": {"triton quantize": "pass"},
    }

    text = render(document, Format.TEXT)

    assert "copies 2900 GB/s" in text
    assert "87% of memory" in text
    assert text.rstrip().endswith("pass")


def refuses(*arguments):
    raise RuntimeError("no kernel image for this device\nand a long trace")


def test_a_kernel_that_refuses_a_workload_is_named_and_the_others_are_timed(monkeypatch):
    monkeypatch.setattr(bench, "require_gpu", lambda: CPU)
    monkeypatch.setattr(bench, "WORKLOADS", SMALL[:2])
    monkeypatch.setattr(bench, "seconds", lambda call: (call(), 1e-3)[1])
    monkeypatch.setattr(bench, "measure_rates", lambda device: bench.MeasuredRates("G", 1e12, 1e15))
    monkeypatch.setattr(kernels_bench, "_verdict", lambda implementation, operation: "pass")
    kernels = [("peer", refuses), ("mine", lambda *arguments: None)]
    monkeypatch.setattr(kernels_bench, "_kernels", lambda operation: iter(kernels))

    document = kernels_bench.bench_document(None)

    assert [one["operation"] for one in document["timings"]] == ["quantize", "dequantize"]
    assert {one["implementation"] for one in document["timings"]} == {"mine"}
    said = "peer refused quantize M=64 K=256: RuntimeError: no kernel image for this device\n"
    assert said in render(document, Format.TEXT)
    assert bench_command(op=None, output=None, format=Format.JSON) == 2


def test_after_an_error_that_the_gpu_keeps_nothing_more_is_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", refuses)
    with pytest.raises(CheckError, match=r"^peer: wrong; the GPU is unusable"):
        bench._still_usable(torch.device("cuda"), "peer: wrong")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time on")
def test_without_a_gpu_the_command_says_what_can_be_done():
    with pytest.raises(CheckError, match=r"needs a CUDA GPU .*`--predict` prints"):
        bench_command()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predict": True, "chip": ["A100"]}, "unknown chip 'A100'"),
        ({"predict": True, "op": "sort"}, "unknown operation 'sort'"),
        ({"chip": ["B200"]}, "--chip goes with --predict"),
        ({"predict": True, "tune": True}, "give one of them"),
    ],
)
def test_what_cannot_be_predicted_is_an_error_in_words(arguments, message):
    with pytest.raises(CheckError, match=message):
        bench_command(**arguments)
