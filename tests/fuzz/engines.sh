#!/bin/sh
# Fuzzes the C++ engines with libFuzzer, which comes with clang, under AddressSanitizer and UBSan.
#
#     tests/fuzz/engines.sh 60 [folder of a corpus]    # seconds
#
# Unoptimised, as the kernels of all instruction sets take clang a quarter of an hour otherwise; so it takes some minutes
# and 6 GB. Left out of UBSan: `function`, for a kernel is called by a pointer whose parameter is the like-named struct of
# another namespace, and `pointer-overflow`, which is checked at every access to a vector.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
mkdir -p "$out/corpus" fuzz-findings
for source in "$here/engines.cpp" "$here/../../csrc/sliding/sliding.cpp" "$here/../../csrc/pruned/pruned.cpp"; do
    "${CXX:-clang++}" -std=c++17 -O0 -g1 -fno-omit-frame-pointer -pthread -Wno-psabi -fno-sanitize-recover=all \
        -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize=function,pointer-overflow \
        -c "$source" -o "$out/$(basename "$source" .cpp).o"
done
"${CXX:-clang++}" -fsanitize=fuzzer,address,undefined -pthread -o "$out/engines" "$out"/*.o
"$out/engines" -max_total_time="${1:-60}" -timeout=10 -max_len=512 -rss_limit_mb=2048 -print_final_stats=1 \
    -artifact_prefix=fuzz-findings/ "${2:-$out/corpus}"
