#!/bin/sh
# Builds the C++ core with AddressSanitizer and UBSan and runs it on awkward shapes on every instruction set.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
build() {
    "${CXX:-c++}" -std=c++17 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all \
        -pthread -Wall -Wno-psabi "$@"
}
build -o "$out/common" "$here/common.cpp"
# The sliding engine also tells which instruction sets there are.
build -c -o "$out/sliding.o" "$here/../../csrc/sliding/sliding.cpp"
build -c -o "$out/pruned.o" "$here/../../csrc/pruned/pruned.cpp"
build -o "$out/sliding" "$here/sliding.cpp" "$out/sliding.o"
build -o "$out/pruned" "$here/pruned.cpp" "$out/pruned.o" "$out/sliding.o"
build -DSTANDALONE -o "$out/engines" "$here/../fuzz/engines.cpp" "$out/pruned.o" "$out/sliding.o"
"$out/common"
"$out/sliding"
"$out/pruned"
"$out/engines" 3000
