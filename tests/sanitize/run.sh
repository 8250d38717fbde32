#!/bin/sh
# Builds the C++ core with AddressSanitizer and UBSan and runs it on awkward shapes on every instruction set.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"${CXX:-c++}" -std=c++17 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all \
    -pthread -Wall -o "$out/sliding" "$here/sliding.cpp" "$here/../../csrc/sliding_cpu.cpp"
"$out/sliding"
