// The scan of one cell, compiled once per level (each-level-inl.h).
//
// A lane is a window. A cell's windows are turned to float once for all of its queries, sixteen beside each other, and
// queries' features broadcast against them. They lie in random order, so a lane of a query's sums is a random group of
// the cell; what the lanes scatter is what the scan's error is estimated from.

#define PS_LANES 16
#include "../common/vector-inl.h"

// Queries and vectors of windows at a time, and parts of a sum, that keep the registers and the multiply-add units busy.
#if PS_LEVEL == 512
constexpr int QT = 4, VT = 3, SPLIT = 2;
#elif PS_LEVEL == 256
constexpr int QT = 2, VT = 2, SPLIT = 1;
#else
constexpr int QT = 2, VT = 1, SPLIT = 1;
#endif

// Sixteen half floats, and sixteen bytes, as floats. Half floats without hardware: the exponent moves over, subnormals
// come out of a product.
#if PS_LEVEL == 512
PS_INLINE F half_to_float(const uint16_t* from) {
    return F(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
PS_INLINE F bytes_to_float(const uint8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return F(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)));
}
#elif PS_LEVEL == 256
PS_INLINE F half_to_float(const uint16_t* from) {
    const __m256 x[2] = {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
                         _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8)))};
    F both;
    __builtin_memcpy(&both, x, sizeof both);
    return both;
}
PS_INLINE F bytes_to_float(const uint8_t* from) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m256 x[2] = {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
                         _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
    F both;
    __builtin_memcpy(&both, x, sizeof both);
    return both;
}
#else
PS_INLINE F half_to_float(const uint16_t* from) {
    float to[LANES];
    for (int d = 0; d < LANES; ++d) {
        const uint32_t bits = uint32_t(from[d] & 0x7fff) << 13 | uint32_t(from[d] & 0x8000) << 16;
        float x;
        std::memcpy(&x, &bits, sizeof x);
        to[d] = x * 0x1p112f;
    }
    F all;
    __builtin_memcpy(&all, to, sizeof all);
    return all;
}
PS_INLINE F bytes_to_float(const uint8_t* from) {
    F all;
    for (int i = 0; i < LANES; ++i) all[i] = float(from[i]);
    return all;
}
#endif

// The sum of each of LANES vectors, as `transpose` and an addition of all rows would give it.
PS_INLINE F sums_of(F (&x)[LANES]) {
    PS_UNROLL for (int i = 0; i < 8; ++i) {
        const F a = x[i], b = x[i + 8];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    PS_UNROLL for (int i = 0; i < 4; ++i) {
        const F a = x[i], b = x[i + 4];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
    PS_UNROLL for (int i = 0; i < 2; ++i) {
        const F a = x[i], b = x[i + 2];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    const F a = x[0], b = x[1];
    return __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

PS_INLINE float sum_of(F x) {
    x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return x[0] + x[1];
}

// rows [LANES][LANES] -> columns, by halves, quarters, ..
PS_INLINE void transpose(F (&x)[LANES]) {
    PS_UNROLL for (int i = 0; i < 8; ++i) {
        const F a = x[i], b = x[i + 8];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        x[i + 8] = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    PS_UNROLL for (int j = 0; j < 8; ++j) {
        const int i = (j & 3) + (j & 4) * 2;
        const F a = x[i], b = x[i + 4];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        x[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
    PS_UNROLL for (int j = 0; j < 8; ++j) {
        const int i = (j & 1) + (j & 6) * 2;
        const F a = x[i], b = x[i + 2];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        x[i + 2] = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    PS_UNROLL for (int j = 0; j < 8; ++j) {
        const int i = 2 * j;
        const F a = x[i], b = x[i + 1];
        x[i] = __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
        x[i + 1] = __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    }
}

// out [rows, columns] = bias + a [rows, depth] b [depth, columns]; columns are a multiple of LANES.
template <int ROWS, int VECTORS>
PS_INLINE void product_tile(const float* a, int64_t a_pitch, const float* b, int64_t columns, int depth,
                            const float* bias, float* out) {
    F sum[ROWS][VECTORS];
    for (int v = 0; v < VECTORS; ++v)
        for (int i = 0; i < ROWS; ++i) sum[i][v] = bias ? load(bias + v * LANES) : F{};
    for (int64_t d = 0; d < depth; ++d, b += columns) {
        F x[VECTORS];
        for (int v = 0; v < VECTORS; ++v) x[v] = load(b + v * LANES);
        PS_UNROLL for (int i = 0; i < ROWS; ++i) {
            const F y = broadcast(a[i * a_pitch + d]);
            for (int v = 0; v < VECTORS; ++v) sum[i][v] += y * x[v];
        }
    }
    PS_UNROLL for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < VECTORS; ++v) store(out + i * columns + v * LANES, sum[i][v]);
}

static void product(const float* a, int64_t a_pitch, int rows, const float* b, int64_t columns, int depth,
                    const float* bias, float* out) {
    constexpr int ROWS = QT, VECTORS = VT;
    // Columns outside, so that a strip of b stays near for all rows.
    for (int64_t c = 0; c < columns; c += VECTORS * LANES) {
        const float* const at = bias ? bias + c : nullptr;
        const bool whole = c + VECTORS * LANES <= columns;
        int i = 0;
        for (; whole && i + ROWS <= rows; i += ROWS)
            product_tile<ROWS, VECTORS>(a + i * a_pitch, a_pitch, b + c, columns, depth, at, out + i * columns + c);
        for (; i < rows; ++i)
            for (int v = 0; v < VECTORS && c + v * LANES < columns; ++v)
                product_tile<1, 1>(a + i * a_pitch, a_pitch, b + c + v * LANES, columns, depth,
                                   at ? at + v * LANES : nullptr, out + i * columns + c + v * LANES);
    }
}

// Uniform in (0, 1) from two well mixed numbers.
PS_INLINE F uniform(uint32_t a, U b) {
    U x = (b ^ a) * 0x9E3779B1u;
    x = (x ^ (x >> 15)) * 0x85EBCA77u;
    return (__builtin_convertvector(I(x >> 8), F) + 0.5f) * 0x1p-24f;
}

PS_INLINE float greatest_of(F x) {
    float most = x[0];
    for (int i = 1; i < LANES; ++i) most = x[i] > most ? x[i] : most;
    return most;
}

// A query in a cell. A lane of its sums is a random group of the cell's windows.
template <int C>
struct Run {
    F y[1 + C], s2;
    const float* q;
    float m, cut;            // reference; the sample's threshold, a weight relative to it that luck is multiplied with
    bool met;                // a window that weighs something
    uint32_t luck;
    int take;
};

template <int C>
PS_INLINE void set_cut(const CellTask& t, const Entry& entry, Run<C>& run) {
    const float threshold = t.recheck ? t.samples[entry.query].threshold : INFINITY;
    const float bits = threshold - run.m * t.scale;
    run.cut = bits < 100.f ? std::exp2(bits) / entry.factor : INFINITY;
}

// Which window of the cell the scan meets as number `i`: cells are read from a rotating start on.
PS_INLINE int64_t window_at(const CellTask& t, int64_t i) {
    i += t.start;
    if (i >= t.competing) i -= t.competing;
    return t.order ? t.order[i] : i;
}

// Windows from w on, V vectors of a block, against Q queries from `entry` on.
template <int C, int Q, int V>
PS_INLINE void scan_tile(const CellTask& t, Run<C>* runs, int entry, int first, int w) {
    const int r = t.rank;
    const float* p = t.block + int64_t(w) * r;
    const F scale = broadcast(t.scale);
    // Each sum in SPLIT parts, so that even few of them keep the multiply-add units busy.
    F dot[Q][V], odd[Q][V];
    PS_UNROLL for (int v = 0; v < V; ++v)
        for (int i = 0; i < Q; ++i) dot[i][v] = -load(t.block_squares + w + v * LANES), odd[i][v] = F{};
    const float* q[Q];
    PS_UNROLL for (int i = 0; i < Q; ++i) q[i] = runs[entry + i].q;
    for (int64_t d = 0; d + SPLIT <= r; d += SPLIT) {
        F x[V], z[V];
        PS_UNROLL for (int v = 0; v < V; ++v) {
            x[v] = load(p + (int64_t(v) * r + d) * LANES);
            if (SPLIT > 1) z[v] = load(p + (int64_t(v) * r + d + 1) * LANES);
        }
        PS_UNROLL for (int i = 0; i < Q; ++i)
            for (int v = 0; v < V; ++v) {
                dot[i][v] += x[v] * q[i][d];
                if (SPLIT > 1) odd[i][v] += z[v] * q[i][d + 1];
            }
    }
    if (SPLIT > 1)
        PS_UNROLL for (int i = 0; i < Q; ++i)
            for (int v = 0; v < V; ++v) {
                if (r % 2) dot[i][v] += load(p + (int64_t(v) * r + r - 1) * LANES) * q[i][r - 1];
                dot[i][v] += odd[i][v];
            }

    F lanes;
    for (int i = 0; i < LANES; ++i) lanes[i] = float(i);
    PS_UNROLL for (int i = 0; i < Q; ++i) {
        Run<C>& run = runs[entry + i];
        if (PS_RARELY(first + w + V * LANES > run.take))
            for (int v = 0; v < V; ++v)
                dot[i][v] = lanes < float(run.take - first - w - v * LANES) ? dot[i][v] : broadcast(-FAR);
        F best = dot[i][0];
        for (int v = 1; v < V; ++v) best = dot[i][v] > best ? dot[i][v] : best;
        float lowest = run.m - t.negligible;
        if (!any_above(best, broadcast(lowest))) continue;
        run.met = true;
        const bool rising = any_above(best, broadcast(run.m + t.rise));
        for (int v = 0; v < V; ++v) {
            const int at = w + v * LANES;
            // Vector by vector, so that it rises where it would if the query were alone.
            if (PS_RARELY(rising) && any_above(dot[i][v], broadcast(run.m + t.rise))) {
                const float m = greatest_of(dot[i][v]), factor = std::exp2((run.m - m) * t.scale);
                for (int c = 0; c < 1 + C; ++c) run.y[c] *= factor;
                run.s2 *= factor * factor;
                run.m = m, lowest = m - t.negligible;
                set_cut(t, t.entries[entry + i], run);
            }
            F e = exp2((dot[i][v] - run.m) * scale);
            e = dot[i][v] > lowest ? e : F{};  // as where all are, so that company changes nothing
            const F weight = t.counts ? e * load(t.block_counts + at) : e;
            run.y[0] += weight;
            for (int c = 0; c < C; ++c) run.y[1 + c] += weight * load(t.block_values + c * BLOCK + at);
            run.s2 += weight * e;
            if (!t.recheck) continue;
            // Priority sampling: a window of weight p and luck u is kept while p / u is among the largest.
            U luck;
            __builtin_memcpy(&luck, t.block_luck + at, sizeof luck);
            const F u = uniform(run.luck, luck);
            unsigned kept = above(weight, u * run.cut);
            while (PS_RARELY(kept)) {
                const int j = __builtin_ctz(kept);
                kept &= kept - 1;
                const Entry& taken = t.entries[entry + i];
                const float log_weight = dot[i][v][j] * t.scale;
                const float log_count = t.counts ? std::log2(t.block_counts[at + j]) : 0.f;
                const float log_size = log_weight + log_count + std::log2(taken.factor);
                Samples& samples = t.samples[taken.query];
                const float threshold = samples.threshold;
                samples.add({log_size - std::log2(u[j]), log_size, log_weight, log_count, t.cell,
                             int32_t(window_at(t, first + at + j))}, t.recheck);
                if (samples.threshold > threshold) set_cut(t, taken, run);
            }
        }
    }
}

constexpr int AHEAD = 48;  // windows between the one that is read and the one that is fetched into the cache

// Sixteen values of each of C channels, from bytes side by side.
template <int C>
PS_INLINE void split_values(const uint8_t* from, float* to) {
    if (C == 1) {
        store(to, F(bytes_to_float(from)) * (1 / 127.5f) - 1.f);
        return;
    }
    alignas(64) uint8_t apart[C][LANES];
    if (C == 3) {
        typedef uint8_t B __attribute__((vector_size(16)));
        B x[3];
        __builtin_memcpy(x, from, sizeof x);
        const B red = __builtin_shufflevector(x[0], x[1], 0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 0, 0, 0, 0, 0);
        const B green = __builtin_shufflevector(x[0], x[1], 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 0, 0, 0, 0, 0);
        const B blue = __builtin_shufflevector(x[0], x[1], 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 0, 0, 0, 0, 0, 0);
        const B all[3] = {
            __builtin_shufflevector(red, x[2], 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 17, 20, 23, 26, 29),
            __builtin_shufflevector(green, x[2], 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 18, 21, 24, 27, 30),
            __builtin_shufflevector(blue, x[2], 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19, 22, 25, 28, 31)};
        __builtin_memcpy(apart, all, sizeof apart);
    } else {
        for (int i = 0; i < LANES; ++i)
            for (int c = 0; c < C; ++c) apart[c][i] = from[i * C + c];
    }
    for (int c = 0; c < C; ++c) store(to + c * BLOCK, F(bytes_to_float(apart[c])) * (1 / 127.5f) - 1.f);
}

// Windows first .. first + count of the cell: turned to float, sixteen beside each other.
template <int C>
PS_INLINE void unpack(const CellTask& t, int first, int count) {
    const int r = t.rank;
    U lanes;
    for (int i = 0; i < LANES; ++i) lanes[i] = uint32_t(i);
    for (int w = 0; w < count; w += LANES) {
        const uint16_t* rows[LANES];
        U number;
        const int64_t turn = t.start + first + w - (t.start + first + w >= t.competing ? t.competing : 0);
        if (!t.order && turn + LANES <= t.competing) {
            for (int i = 0; i < LANES; ++i) rows[i] = t.features + (turn + i) * t.stored_rank;
            number = lanes + uint32_t(t.first_window + turn);
            if (t.value_bytes) {
                split_values<C>(t.value_bytes + turn * C, t.block_values + w);
            } else {
                for (int i = 0; i < LANES; ++i)
                    for (int c = 0; c < C; ++c) t.block_values[c * BLOCK + w + i] = t.value_floats[(turn + i) * C + c];
            }
            for (int i = 0; t.counts && i < LANES; ++i) t.block_counts[w + i] = t.repeats[t.counts[turn + i]];
        } else {
            for (int i = 0; i < LANES; ++i) {
                const int64_t at = window_at(t, first + (w + i < count ? w + i : count - 1));
                rows[i] = t.features + at * t.stored_rank;
                number[i] = uint32_t(t.first_window + at);
                for (int c = 0; c < C; ++c)
                    t.block_values[c * BLOCK + w + i] = t.value_bytes
                                                            ? float(t.value_bytes[at * C + c]) * (1 / 127.5f) - 1.f
                                                            : t.value_floats[at * C + c];
                if (t.counts) t.block_counts[w + i] = t.repeats[t.counts[at]];
            }
        }
        U luck = number * 0xC2B2AE3Du;
        luck = (luck ^ (luck >> 15)) * 0x27D4EB2Fu;
        luck ^= luck >> 13;
        __builtin_memcpy(t.block_luck + w, &luck, sizeof luck);
        const uint16_t* const later = rows[0] + AHEAD * t.stored_rank;
        for (int d = 0; d < LANES * t.stored_rank; d += 32) __builtin_prefetch(later + d);
        float* const to = t.block + int64_t(w) * r;
        F square = F{};
        for (int d = 0; d < r; d += LANES) {
            F x[LANES];
            // Beyond the last axis other numbers follow, at the end of the file sixteen zeros.
            PS_UNROLL for (int i = 0; i < LANES; ++i) x[i] = half_to_float(rows[i] + d);
            transpose(x);
            const int axes = r - d < LANES ? r - d : LANES;
            for (int j = 0; j < axes; ++j) {
                square += x[j] * x[j];
                store(to + int64_t(d + j) * LANES, x[j]);
            }
        }
        store(t.block_squares + w, square * 0.5f);
    }
}

// The queries of one cell against all of the cell's windows that any of them takes.
template <int C>
static void scan_cell(const CellTask& t) {
    Run<C>* const runs = static_cast<Run<C>*>(t.runs);
    for (int e = 0; e < t.entry_count; ++e) {
        const Entry& entry = t.entries[e];
        Run<C>& run = runs[e];
        for (int c = 0; c < 1 + C; ++c) run.y[c] = F{};
        run.s2 = F{}, run.met = false;
        run.q = t.q + int64_t(entry.query) * t.q_pitch;
        run.m = t.m[entry.query], run.luck = t.luck[entry.query], run.take = entry.take;
        set_cut(t, entry, run);
    }
    const int most = t.entries[0].take;
    for (int first = 0; first < most; first += BLOCK) {
        const int count = most - first < BLOCK ? most - first : BLOCK;
        unpack<C>(t, first, count);
        const auto vectors = [&](int e) {
            const int taken = (e < t.entry_count ? t.entries[e].take : 0) - first;
            return ((taken < count ? taken : count) + LANES - 1) / LANES;
        };
        // Queries that take less stand further back: some together as far as all of them go, then one by one.
        int e = 0;
        for (; vectors(e) > 0; e += QT) {
            const int together = vectors(e + QT - 1);
            int v = 0;
            for (; v + VT <= together; v += VT) scan_tile<C, QT, VT>(t, runs, e, first, v * LANES);
            for (; v < together; ++v) scan_tile<C, QT, 1>(t, runs, e, first, v * LANES);
            for (int i = 0; i < QT; ++i) {
                const int alone = vectors(e + i);
                v = together > 0 ? together : 0;
                for (; v + VT <= alone; v += VT) scan_tile<C, 1, VT>(t, runs, e + i, first, v * LANES);
                for (; v < alone; ++v) scan_tile<C, 1, 1>(t, runs, e + i, first, v * LANES);
            }
        }
        if (t.interrupt->stopped(t.calling_thread)) return;
    }

    // Into the queries' sums; of a cell taken by chance, what it differs by from what was foreseen.
    F linear;  // 1 where a part grows with the weights, 0 where with their squares
    I sums;    // which parts are sums, not second moments
    for (int part = 0; part < LANES; ++part) {
        linear[part] = part == 0 || (part >= 3 && part < 3 + C) ? 1.f : 0.f;
        sums[part] = part == 1 || linear[part] > 0 ? -1 : 0;
    }
    for (int e = 0; e < t.entry_count; ++e) {
        const Entry& entry = t.entries[e];
        const Run<C>& run = runs[e];
        if (!run.met && entry.foreseen <= 0) continue;
        F parts[LANES];
        for (F& part : parts) part = F{};
        parts[0] = run.y[0], parts[1] = run.s2, parts[2] = run.y[0] * run.y[0];
        for (int c = 0; c < C; ++c) {
            parts[3 + c] = run.y[1 + c];
            parts[3 + C + c] = run.y[0] * run.y[1 + c], parts[3 + 2 * C + c] = run.y[1 + c] * run.y[1 + c];
        }
        F x = run.met ? sums_of(parts) : F{};
        alignas(64) float was[LANES], more[LANES] = {};
        store(was, x);
        x *= sums ? broadcast(entry.factor) : broadcast(entry.scatter);
        if (entry.scatter > 0 || entry.chance < 1) {
            float foreseen = 0;
            if (entry.foreseen > 0) {
                float bits = t.calibration[entry.query] - run.m * t.scale;
                bits = bits < 100.f ? bits : 100.f;
                foreseen = entry.foreseen * std::exp2(bits) / entry.chance;
            }
            const float luck = 1.f - entry.chance, each = entry.scatter / LANES;
            const float sum = was[0], beside = sum * entry.factor - foreseen;
            more[0] = -foreseen, more[2] = luck * beside * beside - each * sum * sum;
            for (int c = 0; c < C; ++c) {
                const float sum_v = was[3 + c], foreseen_v = foreseen * t.moments[c];
                const float beside_v = sum_v * entry.factor - foreseen_v;
                more[3 + c] = -foreseen_v;
                more[3 + C + c] = luck * beside * beside_v - each * sum * sum_v;
                more[3 + 2 * C + c] = luck * beside_v * beside_v - each * sum_v * sum_v;
            }
            x += load(more);
        }
        float* const to = t.sums + int64_t(entry.query) * LANES;
        F before = load(to);
        if (t.m[entry.query] != run.m) {
            const float f = std::exp2((t.m[entry.query] - run.m) * t.scale);
            before *= f * f + linear * (f - f * f);
            t.m[entry.query] = run.m;
        }
        store(to, before + x);
    }
}

PS_INLINE void add_to(double& total, F x) {
    for (int i = 0; i < LANES; ++i) total += double(x[i]);
}

// The greatest x of a cell with windows.
static float greatest(const float* x, const float* competing, int64_t cells) {
    F best = broadcast(-INFINITY);
    for (int64_t c = 0; c < cells; c += LANES) {
        const F here = load(competing + c) > 0.f ? load(x + c) : broadcast(-INFINITY);
        best = here > best ? here : best;
    }
    float most = best[0];
    for (int i = 1; i < LANES; ++i) most = best[i] > most ? best[i] : most;
    return most;
}

// share = e^(expected - top), at least e^-80, at most 1: what is expected of an empty cell means nothing.
static void exponentials(const float* expected, int64_t cells, float top, float* share) {
    constexpr float BITS = 1.44269504f;
    for (int64_t c = 0; c < cells; c += LANES) {
        F x = (load(expected + c) - top) * BITS;
        x = x > -115.f ? x : broadcast(-115.f);
        x = x < 0.f ? x : F{};
        store(share + c, exp2(x));
    }
}

// Windows taken if every cell gives min(1, max(floor, t share)), and how many more a larger t would take.
static void windows_taken(const float* share, const float* competing, int64_t cells, float t, float floor,
                          double& taken, double& rising) {
    taken = rising = 0;
    for (int64_t start = 0; start < cells; start += 1024) {
        const int64_t end = start + 1024 < cells ? start + 1024 : cells;
        F sum = F{}, slope = F{};
        for (int64_t c = start; c < end; c += LANES) {
            const F f = load(share + c) * t, n = load(competing + c);
            const F least = f > floor ? f : broadcast(floor);
            sum += n * (least < 1.f ? least : broadcast(1.f));
            const I inside = (f > floor) & (f < 1.f);
            slope += inside ? n * f : F{};
        }
        for (int i = 0; i < LANES; ++i) taken += double(sum[i]), rising += double(slope[i]);
    }
}

// Parents of which more than the least weight is foreseen; what is foreseen of the others is added up.
static int64_t choose_parents(ParentsTask& t, int32_t* chosen) {
    int64_t count = 0;
    F far[1 + MOST_CHANNELS];
    for (F& x : far) x = F{};
    for (double& x : t.far) x = 0;
    for (int64_t p = 0; p < t.parents; p += LANES) {
        const F mass = load(t.share + p) * load(t.competing + p), none = mass > t.least ? F{} : mass;
        far[0] += none;
        for (int k = 0; k < t.channels; ++k) far[1 + k] += none * load(t.moments + k * t.parents + p);
        unsigned bits = above(mass, broadcast(t.least));
        while (bits) {
            chosen[count++] = int32_t(p + __builtin_ctz(bits));
            bits &= bits - 1;
        }
    }
    for (int k = 0; k < 1 + t.channels; ++k) add_to(t.far[k], far[k]);
    return count;
}

// log E[w] and log E[w^2] of a family's cells for the features of Q queries; by axis two weights of each.
template <int Q>
PS_INLINE void foresee_tile(const Foreseeing* asked, int rank, const float* weights) {
    F a[Q], b[Q];
    PS_UNROLL for (int i = 0; i < Q; ++i) a[i] = load(weights), b[i] = load(weights + LANES);
    weights += 2 * LANES;
    for (int d = 0; d < rank; ++d, weights += 4 * LANES) {
        const F linear = load(weights), square = load(weights + LANES);
        const F linear2 = load(weights + 2 * LANES), square2 = load(weights + 3 * LANES);
        PS_UNROLL for (int i = 0; i < Q; ++i) {
            const F x = broadcast(asked[i].q[d]);
            a[i] += (linear + square * x) * x;
            b[i] += (linear2 + square2 * x) * x;
        }
    }
    PS_UNROLL for (int i = 0; i < Q; ++i) store(asked[i].to, a[i]), store(asked[i].to + LANES, b[i]);
}

static void foresee(const Foreseeing* asked, int64_t count, int rank, const float* weights) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) foresee_tile<4>(asked + i, rank, weights);
    for (; i < count; ++i) foresee_tile<1>(asked + i, rank, weights);
}

// Neyman's allocation goes by sqrt(E[w^2]), which a normal cell's far tail inflates: a cell's score is its geometric
// mean with E[w]. Shares and scores relative to the greatest, whose log-weight it returns; what is expected of an empty
// cell means nothing.
static float shares_and_scores(const CellsTask& t, float* share, float* score, float* competing, double& claimed) {
    constexpr float BITS = 1.44269504f;
    const auto score_of = [](F a, F b) { return a * 0.5f + b * 0.25f; };
    F best = broadcast(-INFINITY), best_score = best;
    for (int64_t f = 0; f < t.families; ++f) {
        const F a = load(t.foreseen + f * 2 * LANES), s = score_of(a, load(t.foreseen + (f * 2 + 1) * LANES));
        const F n = load(t.all_competing + int64_t(t.parents[f]) * LANES), none = broadcast(-INFINITY);
        store(competing + f * LANES, n);
        const F here = n > 0.f ? a : none, here_score = n > 0.f ? s : none;
        best = here > best ? here : best, best_score = here_score > best_score ? here_score : best_score;
    }
    const float top = greatest_of(best), top_score = greatest_of(best_score);
    const auto exponential = [](F x) {
        x = x * BITS;
        x = x > -115.f ? x : broadcast(-115.f);
        return exp2(x < 0.f ? x : F{});
    };
    F sum = F{};
    for (int64_t f = 0; f < t.families; ++f) {
        const F a = load(t.foreseen + f * 2 * LANES), s = score_of(a, load(t.foreseen + (f * 2 + 1) * LANES));
        const F e = exponential(s - top_score);
        store(share + f * LANES, exponential(a - top)), store(score + f * LANES, e);
        sum += e * load(competing + f * LANES);
    }
    claimed = 0;
    add_to(claimed, sum);
    return top;
}

// Which cells a query looks into, and how many windows of each: whole groups, the last of them by luck. Entries get
// their cell, how many windows, the chance and the foreseen weight. Adds up what is foreseen of the cells.
template <int C>
static int64_t plan_cells_of(CellsTask& t, Planned* planned) {
    constexpr float BITS = 1.44269504f;
    F number;
    for (int i = 0; i < LANES; ++i) number[i] = float(i);
    int64_t count = 0;
    for (int64_t start = 0; start < t.families; start += 64) {
        const int64_t end = start + 64 < t.families ? start + 64 : t.families;
        F sure_sum = F{}, far[1 + C], unseen[1 + 2 * C];
        for (F& x : far) x = F{};
        for (F& x : unseen) x = F{};
        for (int64_t family = start; family < end; ++family) {
            const int64_t c = family * LANES, first = int64_t(t.parents[family]) * LANES;
            const F n = load(t.competing + c), share = load(t.share + c);
            F f = load(t.score + c) * t.scale;
            f = f > t.floor ? f : broadcast(t.floor);
            f = f < 1.f ? f : broadcast(1.f);
            const F few = n * f;
            const I small = n <= float(LANES), all = small ? f >= 1.f : n - few <= float(LANES / 2);
            F groups = small ? f : few * (1.f / LANES);
            // The cell of which most is expected is looked into for sure.
            groups = (share > 0.9999f) & (groups < 1.f) ? broadcast(1.f) : groups;
            const F whole_groups = __builtin_convertvector(__builtin_convertvector(groups, I), F);
            const U cell = __builtin_convertvector(__builtin_convertvector(number + float(first), I), U) * 0xC2B2AE3Du;
            const F drawn = uniform(t.luck, cell ^ (cell >> 15));
            const F taken_groups = whole_groups + (drawn < groups - whole_groups ? broadcast(1.f) : F{});
            F take = small ? taken_groups * n : taken_groups * float(LANES);
            take = all | (take > n) ? n : take;
            F chance = groups < 1.f ? groups : broadcast(1.f);
            chance = all ? broadcast(1.f) : chance;
            const F mass = n * share;
            const I sure = chance >= 1.f;
            sure_sum += sure ? mass : F{};
            const F by_chance = sure ? F{} : mass;
            far[0] += by_chance;
            // N^2 (1 - f) / n E[w^2], and where cells are taken by chance as much again as their rarity.
            F seen = take > 0.f ? take : broadcast(float(LANES));
            seen = seen < n ? seen : n;
            F variance = n * (n / (seen * chance) - 1.f);
            F bits = (load(t.foreseen + 2 * c + LANES) - t.top2) * BITS;
            bits = bits < 60.f ? bits : broadcast(60.f);
            bits = bits > -115.f ? bits : broadcast(-115.f);
            variance = (n > 0.f) & (variance > 0.f) ? variance * exp2(bits) : F{};
            unseen[0] += variance;
            for (int k = 0; k < C; ++k) {
                const float* const moments = t.moments + first * 2 * C;
                const F mean = load(moments + k * LANES);
                far[1 + k] += by_chance * mean;
                unseen[1 + k] += variance * mean;
                unseen[1 + C + k] += variance * load(moments + (C + k) * LANES);
            }
            unsigned taken = above(take, F{});
            while (taken) {
                const int i = __builtin_ctz(taken);
                taken &= taken - 1;
                planned[count++] = {int32_t(first + i), {0, int(take[i]), 0.f, 0.f, chance[i], mass[i]}};
            }
        }
        add_to(t.sure, sure_sum);
        for (int k = 0; k < 1 + C; ++k) add_to(t.far[k], far[k]);
        for (int k = 0; k < 1 + 2 * C; ++k) add_to(t.unseen[k], unseen[k]);
    }
    return count;
}

static int64_t plan_cells(CellsTask& t, Planned* planned) {
    switch (t.channels) {
        case 1: return plan_cells_of<1>(t, planned);
        case 2: return plan_cells_of<2>(t, planned);
        case 3: return plan_cells_of<3>(t, planned);
        default: return plan_cells_of<4>(t, planned);
    }
}

// |window - image|^2; beyond the image's rows and columns are zeros.
static float distance2(const WindowTask& t) {
    F total = F{};
    for (int c = 0; c < t.channels; ++c)
        for (int i = 0; i < t.size; ++i) {
            const float* const w = t.window + c * t.plane + i * t.pitch;
            const bool inside = i >= t.row0 && i < t.row1;
            const int64_t at = t.at + (int64_t(c) * t.height + i) * t.width;
            for (int v = 0; v < t.size; v += LANES) {
                F x = F{};
                if (inside && t.bytes) {
                    x = (F(bytes_to_float(t.bytes + at + v)) * (1 / 127.5f) - 1.f) * load(t.inside + v);
                } else if (inside) {
                    x = load(t.floats + at + v) * load(t.inside + v);
                }
                const F d = (load(w + v) - x) * load(t.columns + v);
                total += d * d;
            }
        }
    return sum_of(total);
}

static void scan_cell_entry(const CellTask& t) {
    switch (t.channels) {
        case 1: return scan_cell<1>(t);
        case 2: return scan_cell<2>(t);
        case 3: return scan_cell<3>(t);
        case 4: return scan_cell<4>(t);
    }
}
