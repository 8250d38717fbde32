"""The check of Triton code sees what it is for, on kernels that have it."""

import pytest
import triton_code

ARGUMENTS = "tt.func public @f(%p: !tt.ptr<f16>, %n: i32 {x = 1 : i32}, %rows: i32) attributes {noinline = false} {"
FAULTS = {
    "an address grows by 32 bits": """
        %0 = tt.splat %n : i32 -> tensor<64xi32>
        %1 = tt.addptr %q, %0 : tensor<64x!tt.ptr<f16>>, tensor<64xi32>""",
    "a size is multiplied in 32 bits": """
        %c = arith.constant 64 : i32
        %0 = arith.muli %n, %c : i32
        %1 = arith.extsi %0 : i32 to i64
        %2 = tt.addptr %p, %1 : !tt.ptr<f16>, i64""",
    "a size is cut to fewer bits": """
        %0 = arith.extsi %n : i32 to i64
        %1 = arith.trunci %0 : i64 to i32""",
    "store without a mask": """
        tt.store %1, %2 : tensor<64x!tt.ptr<f32>>""",
    "a product in TF32": """
        %3 = tt.dot %1, %2, %0, inputPrecision = tf32 : tensor<16x16xf32> * tensor<16x16xf32> -> tensor<16x16xf32>""",
}
FINE = """
        %c = arith.constant 64 : i32
        %pid = tt.get_program_id x : i32
        %t = arith.remsi %pid, %rows : i32
        %o = arith.muli %t, %c : i32
        %0 = arith.extsi %n : i32 to i64
        %1 = arith.muli %0, %0 : i64
        %2 = tt.addptr %p, %1 : !tt.ptr<f16>, i64
        %r = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32>
        %3 = tt.addptr %q, %r : tensor<64x!tt.ptr<f16>>, tensor<64xi32>
        tt.store %1, %2, %m : tensor<64x!tt.ptr<f32>>
        %4 = tt.dot %1, %2, %0, inputPrecision = tf32 : tensor<16x16xf16> * tensor<16x16xf16> -> tensor<16x16xf32>"""


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_seen(fault):
    found = triton_code.faults(ARGUMENTS + FAULTS[fault], "")
    assert len(found) == 1
    assert found[0].startswith(fault)


def test_code_without_faults_has_none():
    assert triton_code.faults(ARGUMENTS + FINE, "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16") == []


@pytest.mark.parametrize(
    "code", ["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "atom.global.add.f32", "red.global.add"]
)
def test_ptx_is_read(code):
    assert triton_code.faults("", code)
