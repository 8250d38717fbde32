"""What must not be in the code of a Triton kernel, read from its TTIR and PTX: a GPU is not needed to see it.

- An offset of an address that grows with a size of the call is of 64 bits: sizes are the kernel's arguments and program
  numbers, and what is computed from them. So is whatever is multiplied on the way: a product of 32 bits is over before
  it is widened. A remainder is smaller than what it is divided by, and a product of it by a constant may stay (a tile's
  place within a row of tiles).
- Every store is masked.
- No product of float32 goes through TF32.
- Nothing is atomic: sums would depend on the order.
"""

import re

VALUE = r"%[\w#]+"
KEEPS_BITS = ("tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.trans", "arith.addi", "arith.subi",
              "arith.minsi", "arith.maxsi", "arith.divsi", "arith.ceildivsi", "arith.select")  # fmt: skip


def faults(ttir: str, ptx: str) -> list[str]:
    """One line for each; none where the code is as it must be."""
    return _ttir_faults(ttir) + _ptx_faults(ptx)


def _ptx_faults(ptx: str) -> list[str]:
    return re.findall(r"\.tf32|(?<![\w.])(?:atom|red)\.\w+", ptx)


def _ttir_faults(ttir: str) -> list[str]:
    found = []
    grows: set[str] = set()  # values that grow with a size
    remainders: set[str] = set()
    constants: set[str] = set()
    for line in ttir.splitlines():
        line = line.split(" loc(")[0].strip()
        if line.startswith("tt.func"):
            # Sizes are the integers among the arguments.
            grows |= {name for name, kind in re.findall(r"(%\w+): (i32|i64)", line)}
            continue
        if line.startswith("scf.for"):
            line = "_ = " + line
        match = re.match(rf"({VALUE}(?:, ?{VALUE})*|_) = ([\w.]+)(.*)", line)
        if "tt.store" in line and match is None:
            operands = re.findall(VALUE, line.split(":")[0])
            if len(operands) < 3:
                found.append(f"store without a mask: {line}")
        if not match:
            continue
        name, operation, rest = match.groups()
        name = name.split(",")[0].split(":")[0]
        operands = re.findall(VALUE, rest.split(" : ")[0])
        narrow = re.search(r"\bi32\b|xi32>", rest) is not None and "i64" not in rest
        growing = any(x in grows for x in operands)
        if operation == "arith.constant":
            constants.add(name)
        elif operation == "tt.get_program_id":
            grows.add(name)
        elif operation == "arith.remsi":
            if growing:
                grows.add(name)
                remainders.add(name)
        elif operation == "arith.muli":
            if growing:
                grows.add(name)
                tile = any(x in remainders for x in operands) and any(x in constants for x in operands)
                if narrow and not tile:
                    found.append(f"a size is multiplied in 32 bits: {line}")
        elif operation in ("arith.extsi", "arith.extui", "arith.trunci"):
            if growing:
                grows.add(name)
            if operation == "arith.trunci" and growing:
                found.append(f"a size is cut to fewer bits: {line}")
        elif operation in KEEPS_BITS:
            if growing:
                grows.add(name)
        elif operation == "tt.addptr":
            offset = rest.rsplit(",", 1)[-1]
            if operands[-1] in grows and "i64" not in offset:
                found.append(f"an address grows by 32 bits: {line}")
        elif operation == "tt.dot" and "tf32" in rest and re.search(r"xf32> \* ", rest):
            found.append(f"a product in TF32: {line}")
    return found
