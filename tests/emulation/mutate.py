# ruff: noqa: E501, the faults as lines of a table
"""Plants one fault at a time in the CUDA kernels or their host code and says which the tests catch.

Each fault is put into a copy of the tree, built, and tests/test_sliding_cuda.py runs until something fails. Writes
tests/emulation/mutations.json. `python tests/emulation/mutate.py [--only WORD ...] [--jobs N]`; some fifteen CPU minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Lock

import hypothesis  # noqa: F401
import pytest
import torch  # noqa: F401

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "emulation" / "mutations.json"
KERNELS, HOST = "csrc/sliding/sliding.cu", "patchscore/engines/sliding/cuda.py"
BARRIER = "__syncthreads();\n"

FAULTS: list[tuple[str, str, str, str]] = [
    # (what it is, file, text that stands there once, what takes its place)
    # What threads do together.
    ("the full mask in divergent code", KERNELS, "if (risen == 2 || !any_lane(total[jj] > RISE)) break;",
     "if (risen == 2 || total[jj] <= RISE) break;"),
    ("no barrier before a group is staged", KERNELS, "norms of this group's tiles.\n        " + BARRIER, "tiles.\n"),
    ("no barrier after a group is staged", KERNELS, "exist != 0xffffu);\n        " + BARRIER, "exist != 0xffffu);\n"),
    ("no barrier between rows", KERNELS, "                }\n                " + BARRIER, "                }\n"),
    ("no barrier before lanes are merged", KERNELS, "in their order.\n    " + BARRIER, "in their order.\n"),
    ("warps come to a barrier unequally often", KERNELS, "step < length;", "step < at_most(length, hi - start);"),
    ("a vote where only some lanes are", KERNELS, "if (total[jj] <= RISE) continue;", "if (total[jj] <= RISE) break;"),
    ("a thread leaves before the barriers", KERNELS, "    const Layout layout(t, PARTS);\n\n",
     "    const Layout layout(t, PARTS);\n    if (j0 + row_of_lane >= t.cols.q1) return;\n\n"),
    # Fragments.
    ("rows of A swapped", KERNELS, "a[digit][0] = first[digit], a[digit][1] = first[8 * Q_QUADS + digit]",
     "a[digit][1] = first[digit], a[digit][0] = first[8 * Q_QUADS + digit]"),
    ("halves of A swapped", KERNELS, "a[digit][1] = first[8 * Q_QUADS + digit];\n            a[digit][2] = second[digit]",
     "a[digit][2] = first[8 * Q_QUADS + digit];\n            a[digit][1] = second[digit]"),
    ("both halves of B from the first row", KERNELS, "b1 = at.p_second[", "b1 = at.p_first["),
    ("a digit's weight mistaken", KERNELS, "multiply(products[digit + plane][n]", "multiply(products[digit][n]"),
    ("a product too few", KERNELS, "column < k + quad; column += 4", "column < k + quad - 4; column += 4"),
    ("columns beyond the patch are not zero", KERNELS, "const int* first = column < k ? at.q_first : zeros;",
     "const int* first = at.q_first;"),
    ("the wrong stride of a column", KERNELS, "at.p_first += 4 * P_QUADS", "at.p_first += 4 * TILES"),
    ("an unrolled product of the wrong order", KERNELS, "digits + digit * QUERIES * padded + x",
     "digits + (2 - digit) * QUERIES * padded + x"),
    # Copies into shared memory.
    ("noisy pixels off by one column", KERNELS, "j = j0 - r + col;", "j = j0 - r + col + 1;"),
    ("noisy rows and columns swapped", KERNELS, "* H + i) * W + j];", "* W + j) * H + i];"),
    ("no bounds check of noisy rows", KERNELS, "if (i >= 0 && i < H && j >= 0 && j < W) digits", "if (j >= 0 && j < W) digits"),
    ("the border of noisy images is zero", KERNELS, "{t.outside[0], t.outside[1], t.outside[2], 0}", "{0, 0, 0, 0}"),
    ("no bounds check of training rows", KERNELS, "tile < all_tiles && a >= 0 && a < H && b >= 0", "tile < all_tiles && a < H && b >= 0"),
    ("training columns one too far", KERNELS, "b >= 0 && b < W;\n            const int64_t plane", "b >= 0 && b <= W;\n            const int64_t plane"),
    ("tiles beyond the last are read", KERNELS, "const bool inside = tile < all_tiles && a < a1", "const bool inside = a < a1"),
    ("norms of the wrong image", KERNELS, "(tile / tiles_per_image * H + a) * W + b", "(tile % tiles_per_image * H + a) * W + b"),
    ("a strip's last row is not staged", KERNELS, "t.height : t.strip + k - 1;", "t.height : t.strip + k - 2;"),
    ("room for too few fractions", KERNELS, "(t.planes > 1 ? TILES * window_rows * TILE * 4 : 0)",
     "(t.planes > 1 ? TILES * window_rows * TILE : 0)"),
    ("sums begin between two words", KERNELS, "(pairs + 32 * 4 + 15) / 16 * 16", "pairs + 32 * 4"),
    ("sums do not begin far away", KERNELS, "bits_as_float(1 << 30) : 0.f, 0.f}", "0.f : 0.f, 0.f}"),
    # Which pairs exist, and where rows are.
    ("pairs of tiles that do not exist", KERNELS, "if (tile < all_tiles && b + e < columns && matches)",
     "if (b + e < columns && matches)"),
    ("one column too many exists", KERNELS, "if (tile < all_tiles && b + e < columns &&", "if (tile < all_tiles && b + e <= columns &&"),
    ("locked columns match the first half", KERNELS, "b + e == row_of_lane + 8 * jj", "b + e == row_of_lane"),
    ("a diagonal wraps one row late", KERNELS, "at >= H ? at - H : at;", "at > H ? at - H : at;"),
    ("a displacement too few", KERNELS, "last_d = wrapping ? H - 1 : a1 - 1 - i0;", "last_d = wrapping ? H - 2 : a1 - 2 - i0;"),
    ("a locked row's part overlaps the next", KERNELS, "hi = at_most(lo + part, a1), length = part;",
     "hi = at_most(lo + part + 1, a1), length = part + 1;"),
    ("the row that leaves is one too late", KERNELS, "slot(-1) * q_row", "slot(0) * q_row"),
    ("of an odd patch the last row counts twice", KERNELS, "const bool two = row + 1 < k;", "const bool two = true;"),
    # Weights and sums.
    ("the lower digits with the wrong sign", KERNELS, "float(low - fine) * scale.y", "float(fine - low) * scale.y"),
    ("a reference's lower digits are forgotten", KERNELS, "new_fine = low(x / 2, x % 2);", "new_fine = 0;"),
    ("squares fade like weights", KERNELS, "(jj ? sum.y : sum.x) *= part == 3 ? fade * fade : fade;",
     "(jj ? sum.y : sum.x) *= fade;"),
    ("the second query's weights are forgotten", KERNELS, "> NEGLIGIBLE * s.x || total[1] > NEGLIGIBLE * s.y", "> NEGLIGIBLE * s.x"),
    ("s2 adds weights", KERNELS, "w[jj][x] * w[jj][x];", "w[jj][x];"),
    ("values of the neighbouring column", KERNELS, "a * W + 2 * quad + x % 2;", "a * W + 2 * quad + (x + 1) % 2;"),
    ("three of four lanes are merged", KERNELS, "for (int l = 0; l < 4; ++l) {\n            if", "for (int l = 0; l < 3; ++l) {\n            if"),
    ("merged squares fade like weights", KERNELS, "(c == 1 ? fade * fade : fade);", "fade;"),
    ("the farthest lane is the reference", KERNELS, "bits(l, nearest) > 0.f)) nearest = l;", "bits(l, nearest) < 0.f)) nearest = l;"),
    # Moments.
    ("log-weights stay where they were when a reference moves", KERNELS, "sl.x) -= most * (jj", "sl.x) -= 0.f * most * (jj"),
    ("log-weights of lanes stay where they were", KERNELS, "* bits(l, nearest) * fade", "* 0.f * fade"),
    ("both queries around the first one's centre", KERNELS, "value[c] - centre[jj][c]", "value[c] - centre[0][c]"),
    ("items of a later pass with the first one's centres", HOST, "batch.centres[items].data_ptr()", "batch.centres.data_ptr()"),
    ("log-weights of chunks stay where they were", HOST, "+ risen * s)", "+ 0 * s)"),
    ("squares stay around the centre", HOST, "centre * (part.v + whole)", "centre * part.v"),
    # Where results go.
    ("a chunk begins a group late", KERNELS, "first_group = chunk * t.groups_per_chunk;", "first_group = chunk * t.groups_per_chunk + 1;"),
    ("a chunk takes a group of the next", KERNELS, "group < first_group + t.groups_per_chunk", "group <= first_group + t.groups_per_chunk"),
    ("chunks write over each other", KERNELS, "place = int64_t(chunk) * t.items + item;", "place = item;"),
    ("query blocks and chunks swapped", KERNELS, "chunk = int(blockIdx.x) / query_blocks, query_block = int(blockIdx.x) % query_blocks;",
     "chunk = int(blockIdx.x) % query_blocks, query_block = int(blockIdx.x) / query_blocks;"),
    # The kernels that prepare.
    ("bytes a step too high", KERNELS, "digits[0] = u - 128;", "digits[0] = u - 127;"),
    ("squares in float", KERNELS, "double square = 0;", "float square = 0;"),
    ("sums over rows in float", KERNELS, "to = t.columns + x / t.width * plane + x % t.width;\n    double sum = 0;",
     "to = t.columns + x / t.width * plane + x % t.width;\n    float sum = 0;"),
    ("a column too many in a norm", KERNELS, "if (b - r - 1 >= 0) sum -= from[b - r - 1];", "if (b - r - 2 >= 0) sum -= from[b - r - 2];"),
    ("fractions left out", KERNELS, "float(sum / t.unit - whole);", "0.f;"),
    ("no bounds check of images to pack", KERNELS, "if (x >= plane * t.images) return;", ""),
    # Whole images.
    ("products of images that do not exist", KERNELS, "if (image < t.images)\n                for", "for"),
    ("the wrong noisy image", KERNELS, "at + 8 * padded);", "at + 7 * padded);"),
    ("half of a norm", KERNELS, "norms[n] = dot4(p[n].z, p[n].z, dot4(p[n].w, p[n].w, norms[n]));", ""),
    ("images beyond the last are added", KERNELS, "last = at_most(first + ADDED, t.images);", "last = first + ADDED;"),
    ("values beyond the last are added", KERNELS, "if (x >= t.values) return;", ""),
    ("the wrong stride of noisy images", KERNELS, "to[int64_t(item) * t.values + i]", "to[int64_t(item) * (t.values - 1) + i]"),
    # Second passes: products with the Jacobian, sums of windows.
    ("second pass: squares are summed before all are there", KERNELS, "__syncwarp();\n            box_sums(plane, between, t, lane);\n            if (KIND == FORWARD)",
     "box_sums(plane, between, t, lane);\n            if (KIND == FORWARD)"),
    ("second pass: columns are summed before all rows are", KERNELS, "    __syncwarp();\n}\n\n// Box sums", "}\n\n// Box sums"),
    ("second pass: weights are read before all are there", KERNELS, "continue;\n            __syncwarp();", "continue;"),
    ("second pass: the next displacement comes too soon", KERNELS, "            __syncwarp();\n        }\n    }\n}", "        }\n    }\n}"),
    ("second pass: a box lacks its last pixel", KERNELS, "if (x + r < length) sum", "if (x + r < length - 1) sum"),
    ("second pass: a box begins a pixel late", KERNELS, "if (x - r >= 0 && x - r < length) sum", "if (x - r > 0 && x - r < length) sum"),
    ("second pass: a displacement too few", KERNELS, "axis.w1 - axis.w0 + axis.q1 - axis.q0 - 1;", "axis.w1 - axis.w0 + axis.q1 - axis.q0 - 2;"),
    ("second pass: parts overlap", KERNELS, "int d = part; d < all; d += t.parts", "int d = part; d < all; ++d"),
    ("second pass: an image too few for a warp", KERNELS, "t.images_per_worker < t.images ? first + t.images_per_worker :", "t.images_per_worker < t.images ? first + t.images_per_worker - 1 :"),
    ("second pass: images beyond the last", KERNELS, "int(first + t.images_per_worker < t.images ? first + t.images_per_worker : t.images)", "int(first + t.images_per_worker)"),
    ("second pass: warps without memory work", KERNELS, "if (warp >= t.workers) return;", ""),
    ("second pass: windows of other groups compete", KERNELS, "if (query < axis.q0 || query >= axis.q1) return false;\n", ""),
    ("second pass: a displacement of light windows counts", KERNELS, "weighs = weighs || w > LEAST_WEIGHT;", "weighs = w > LEAST_WEIGHT;"),
    ("second pass: J t about the noisy image", KERNELS, "KIND == FORWARD ? mean[at]", "KIND == FORWARD ? z[at]"),
    ("second pass: windows less the noisy image", KERNELS, "KIND == BACKWARD ? z[at] : 0.f;", "z[at];"),
    ("second pass: items of a later launch with the first one's images", HOST, "noisy[items].data_ptr()", "noisy.data_ptr()"),
    ("second pass: items of a later launch with the first one's scale", HOST, "task.scale = scale[items].data_ptr()\n                for", "task.scale = scale.data_ptr()\n                for"),
    # Launches.
    ("a kernel may have what one launch needs", KERNELS, "cudaFuncAttributeMaxDynamicSharedMemorySize, most);",
     "cudaFuncAttributeMaxDynamicSharedMemorySize, most / 3);"),
    ("only the first device allows shared memory", KERNELS, "allowed.count({kernel, device})", "!allowed.empty()"),
    ("an error stays for the next call", KERNELS, "cudaGetErrorName(error));\n    cudaGetLastError();", "cudaGetErrorName(error));"),
    ("a strip of no rows divides by zero", KERNELS, "(task->strip < 1 || task->groups_per_chunk < 1 ||", "("),
    ("many blocks in a grid's y", KERNELS, "dim3(unsigned(blocks), 1, unsigned(items)), dim3(THREADS)",
     "dim3(blocks > 65535 ? 1 : unsigned(blocks), blocks > 65535 ? unsigned(blocks) : 1, unsigned(items)), dim3(THREADS)"),
    ("blocks beyond 65,536 left out", KERNELS, "dim3(unsigned(blocks), 1, unsigned(items)), dim3(THREADS)",
     "dim3(unsigned(blocks) > 65536 ? 65536 : unsigned(blocks), unsigned(blocks) > 65536 ? unsigned(blocks) / 65536 : 1, unsigned(items)), dim3(THREADS)"),
    ("too much shared memory is asked for", HOST, "ctypes.byref(task)) > limit:", "ctypes.byref(task)) > 2 * limit:"),
    # Host code.
    ("q.p counted once", HOST, "multiplier=2 * batch.top // unit", "multiplier=batch.top // unit"),
    ("integers overflow", HOST, "math.isqrt(2**30 //", "math.isqrt(2**33 //"),
    ("distances overflow", HOST, "(16538 + 32512 * top)) - 30))", "(16538 + 32512 * top)) - 33))"),
    ("sums of products overflow", HOST, "LARGEST_SLICE = 2**16", "LARGEST_SLICE = 2**20"),
    ("references in float32", HOST, "row, col].to(torch.float64).unbind(-1)", "row, col].to(torch.float32).unbind(-1)"),
    ("bits are nats", HOST, "1).mul_(math.log2(math.e)).to(torch.float32)", "1).to(torch.float32)"),
    ("lower digits added", HOST, "coarse * unit - fine * lower +", "coarse * unit + fine * lower +"),
    ("a slab begins at the first image", HOST, "yield images[start : start + count], None, count", "yield images[:count], None, count"),
    ("a selection begins at its first image", HOST, "indices[start : start + count].contiguous()", "indices[:count].contiguous()"),
    ("slabs end within a chunk", HOST, "return images // aligned * aligned if images >= aligned else images", "return images"),
    ("chunks follow the slab", HOST, "groups = -(-bank_size * tiles // TILES)", "groups = -(-slab.images * tiles // TILES)"),
    ("nothing for idle lanes to read", HOST, "images * height * width + TILE, 4 if", "images * height * width, 4 if"),
    ("items of a later pass with the first one's scale", HOST,
     "task.scale = scale[items].data_ptr()\n        task.ref", "task.scale = scale.data_ptr()\n        task.ref"),
    ("items of a later pass with the first one's digits", HOST, "batch.digits[items].data_ptr()", "batch.digits.data_ptr()"),
    ("chunks' squares fade like weights", HOST, "(s2 * fade.square()).sum(0)", "(s2 * fade).sum(0)"),
    ("only one axis of the border is locked", HOST, "value=0.0 if locked else 0.25 * channels", "value=0.25 * channels"),
    ("a group of pixels too few", HOST, "rows=_axis(rows), cols=_axis(cols), images=slab.images", "rows=_axis(cols), cols=_axis(rows), images=slab.images"),
    ("window rows of one piece only", HOST, "for start in starts]", "for start in starts[:1]]"),
    ("a copy overtakes the computation", HOST, "                copying.wait_stream(computing)\n                send", "                send"),
    ("the computation overtakes a copy", HOST, "            computing.wait_event(copied[half])\n", ""),
    ("pinned memory is written too early", HOST, "        copied[half].synchronize()  # its pinned memory is free again\n", ""),
    ("memory is given back under a copy", HOST, "            tensor.record_stream(copying)\n", "            pass\n"),
    ("every launch goes to the first device", HOST, "torch.cuda.current_device() if device.index is None else device.index", "0"),
]  # fmt: skip


def copied(folder: Path) -> Path:
    for name in ("patchscore", "csrc", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def tests_of(fault: str) -> str:
    """Which tests may catch it, as pytest's -k takes them."""
    return "test_products or has_products" if fault.startswith("second pass") else "not registers and not collected"


def tested(tree: Path, cache: Path, tests: str) -> str | None:
    """The first test that fails, or None. In a fork of this process, which has torch loaded already."""
    log = tree / "log.txt"
    child = os.fork()
    if child == 0:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        os.chdir(tree)
        sys.path[:0] = [str(tree), str(tree / "tests")]
        arguments = ["tests/test_sliding_cuda.py", "-x", "-q", "--tb=line", "-m", "not gpu", "-o", f"cache_dir={cache}"]
        code = 100
        try:
            code = int(pytest.main([*arguments, "-k", tests]))
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    said = log.read_text(errors="replace")
    if status == 0:
        return None
    if "CalledProcessError" in said:
        raise RuntimeError(f"it does not compile: {said[-3000:]}")
    failed = re.search(r"^(?:FAILED|ERROR) \S+::(\S+)", said, flags=re.MULTILINE)
    reason = re.search(r"^E +(.*)", said, flags=re.MULTILINE)
    where = failed[1] if failed else f"the process ended with status {status}"
    return f"{where}: {reason[1][:160]}" if reason else where


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="some faults, whose names contain one of these; other results stay")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if not options.only or any(word in fault[0] for word in options.only)]
    chosen.sort(key=lambda fault: fault[1] == KERNELS)  # host code first: nothing to build
    for name, file, old, _ in chosen:
        assert (ROOT / file).read_text().count(old) == 1, f"{name}: the text to replace does not stand there once"
    assert len({fault[0] for fault in FAULTS}) == len(FAULTS)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        trees: Queue[Path] = Queue()
        for job in range(options.jobs):
            trees.put(copied(Path(folder) / str(job)))
        tree = trees.get()
        for tests in {tests_of(fault[0]) for fault in chosen}:
            if first := tested(tree, cache, tests):
                raise SystemExit(f"without a fault: {first}")
        trees.put(tree)

        kept = json.loads(RESULTS.read_text())["rows"] if options.only else []
        rows = {row["fault"]: row for row in kept if row["fault"] in {fault[0] for fault in FAULTS}}
        lock = Lock()

        def run(fault: tuple[str, str, str, str]) -> None:
            name, file, old, new = fault
            tree = trees.get()
            text = (ROOT / file).read_text()
            try:
                (tree / file).write_text(text.replace(old, new))
                caught = tested(tree, cache, tests_of(name))
            finally:
                (tree / file).write_text(text)
                trees.put(tree)
            print(f"{'caught' if caught else 'MISSED'}  {name}: {caught}", flush=True)
            with lock:
                rows[name] = {"fault": name, "file": file, "caught_by": caught}
                # Kept as they come: a run that is cut short is not lost.
                report = {"faults": len(FAULTS), "run": len(rows), "missed": missed(rows), "rows": list(rows.values())}
                RESULTS.write_text(json.dumps(report, indent=1) + "\n")

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(run, chosen))
    print(f"{len(rows)} of {len(FAULTS)} run; missed: {missed(rows)}")


def missed(rows: dict[str, dict]) -> list[str]:
    return [name for name, row in rows.items() if row["caught_by"] is None]


if __name__ == "__main__":
    main()
