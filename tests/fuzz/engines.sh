#!/bin/sh
# Fuzzes the C++ engines with libFuzzer, which comes with clang, under AddressSanitizer and UBSan.
#
#     tests/fuzz/engines.sh 60 [folder of a corpus]    # seconds
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
mkdir -p "$out/corpus"
for source in "$here/engines.cpp" "$here/../../csrc/sliding/sliding.cpp" "$here/../../csrc/pruned/pruned.cpp"; do
    "${CXX:-clang++}" -std=c++17 -O1 -g -fno-omit-frame-pointer -pthread -fno-sanitize-recover=all \
        -fsanitize=fuzzer-no-link,address,undefined -c "$source" -o "$out/$(basename "$source" .cpp).o"
done
"${CXX:-clang++}" -fsanitize=fuzzer,address,undefined -pthread -o "$out/engines" "$out"/*.o
mkdir -p fuzz-findings
"$out/engines" -max_total_time="${1:-60}" -timeout=10 -max_len=512 -rss_limit_mb=2048 -print_final_stats=1 \
    -artifact_prefix=fuzz-findings/ "${2:-$out/corpus}"
