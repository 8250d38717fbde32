// The scan of one cell, compiled once per instruction set: included inside namespace PS_SIMD, which brings
// half_to_float, WT and QV.
//
// A lane is a query. Windows are read one after the other, turned to float once for all queries of the cell, and
// broadcast against vectors of queries, so sums stay in lanes and nothing is shuffled. Every eighth window goes to the
// same of eight groups; what the groups' sums scatter is what the scan's error is estimated from.

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));

PS_INLINE F broadcast(float x) { return F{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
PS_INLINE F load(const float* at) {
    F x;
    __builtin_memcpy(&x, at, sizeof x);
    return x;
}
PS_INLINE void store(float* at, F x) { __builtin_memcpy(at, &x, sizeof x); }
PS_INLINE bool any(I mask) {
    I m = mask;
    int32_t all = 0;
    for (int i = 0; i < LANES; ++i) all |= m[i];
    return all != 0;
}
#if PS_LEVEL == 512
PS_INLINE bool any_above(F a, F b) { return _mm512_cmp_ps_mask(__m512(a), __m512(b), _CMP_GT_OQ) != 0; }
PS_INLINE unsigned above(F a, F b) { return _mm512_cmp_ps_mask(__m512(a), __m512(b), _CMP_GT_OQ); }
PS_INLINE F exp2f_(F x) {  // 2^x to 2.6e-6 for x <= 64; 0 far below
    const __m512 l = __m512(x), f = _mm512_reduce_ps(l, 9);
    F y = broadcast(1.353416792e-02f) * F(f) + 5.201146061e-02f;
    y = y * F(f) + 2.414427569e-01f;
    y = y * F(f) + 6.930038345e-01f;
    y = y * F(f) + 1.000002593e+00f;
    return F(_mm512_scalef_ps(__m512(y), l));
}
#else
PS_INLINE bool any_above(F a, F b) { return any(a > b); }
PS_INLINE unsigned above(F a, F b) {
    const I mask = a > b;
    unsigned bits = 0;
    for (int i = 0; i < LANES; ++i) bits |= unsigned(mask[i] & 1) << i;
    return bits;
}
PS_INLINE F exp2f_(F x) {
    constexpr float ROUND = 12582912.f;  // 1.5 * 2^23
    x = x > -126.f ? x : broadcast(-126.f);
    const F t = x + ROUND, f = x - (t - ROUND);
    F y = broadcast(9.570101911e-03f) * f + 5.591786032e-02f;
    y = y * f + 2.402474483e-01f;
    y = y * f + 6.931218147e-01f;
    y = y * f + 9.999992614e-01f;
    return F(I(y) + (I(t) << 23));
}
#endif

PS_INLINE float sum_of(F x) {
    x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return x[0] + x[1];
}

// rows [LANES][LANES] -> columns, by halves, quarters, ..
PS_INLINE void transpose(F (&x)[LANES]) {
    PS_UNROLL16 for (int i = 0; i < 8; ++i) {
        const F a = x[i], b = x[i + 8];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        x[i + 8] = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    PS_UNROLL16 for (int j = 0; j < 8; ++j) {
        const int i = (j & 3) + (j & 4) * 2;
        const F a = x[i], b = x[i + 4];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        x[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    }
    PS_UNROLL16 for (int j = 0; j < 8; ++j) {
        const int i = (j & 1) + (j & 6) * 2;
        const F a = x[i], b = x[i + 2];
        x[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        x[i + 2] = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    PS_UNROLL16 for (int j = 0; j < 8; ++j) {
        const int i = 2 * j;
        const F a = x[i], b = x[i + 1];
        x[i] = __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
        x[i + 1] = __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    }
}

// What a vector of queries knows between blocks of windows.
template <int C>
struct Lane {
    F m, take, factor;
    F threshold, cut;  // of the priority sample: in bits, and as a weight relative to m that luck is multiplied with
    U luck;
    F s2;
    F y[GROUPS][1 + C];
};

// Uniform in (0, 1), for each query and window the same in whatever company they meet.
PS_INLINE F uniform(U query, uint32_t window) {
    U x = (query ^ window) * 0x9E3779B1u;
    x = (x ^ (x >> 15)) * 0x85EBCA77u;
    x ^= x >> 13;
    return (__builtin_convertvector(I(x >> 8), F) + 0.5f) * 0x1p-24f;
}

template <int C>
PS_INLINE void set_cut(Lane<C>& lane, F scale) {
    F bits = lane.threshold - lane.m * scale;
    bits = bits < 100.f ? bits : broadcast(100.f);
    lane.cut = bits > -100.f ? exp2f_(bits) / lane.factor : F{};
}

// Windows w .. w + WT of a block against N vectors of queries, from vector v on.
template <int C, int N>
PS_INLINE void scan_tile(const CellTask& t, Lane<C>* lanes, int v, int first, int w, int r, F scale) {
    const float* const q0 = t.query_features + int64_t(v) * t.q_pitch * LANES;
    const float* const q1 = q0 + int64_t(N - 1) * t.q_pitch * LANES;
    // Dot products of WT windows with N vectors of queries.
    F dot[WT][N];
    PS_UNROLL16 for (int i = 0; i < WT; ++i)
        for (int u = 0; u < N; ++u) dot[i][u] = broadcast(-t.block_values[(w + i) * (C + 3)]);
    const float* p[WT];
    PS_UNROLL16 for (int i = 0; i < WT; ++i) p[i] = t.block + int64_t(w + i) * t.q_pitch;
    for (int64_t d = 0; d < r; ++d) {
        const F a = load(q0 + d * LANES);
        const F b = N > 1 ? load(q1 + d * LANES) : a;
        PS_UNROLL16 for (int i = 0; i < WT; ++i) {
            const F x = broadcast(p[i][d]);
            dot[i][0] += x * a;
            if (N > 1) dot[i][N - 1] += x * b;
        }
    }

    for (int u = 0; u < N; ++u) {
        Lane<C>& lane = lanes[u];
        F best = dot[0][u];
        PS_UNROLL16 for (int i = 1; i < WT; ++i) best = dot[i][u] > best ? dot[i][u] : best;
        const F lowest = lane.m - load(t.negligible);
        if (!any_above(best, lowest)) continue;
        PS_UNROLL16 for (int i = 0; i < WT; ++i) {
            const F index = broadcast(float(first + w + i));
            dot[i][u] = index < lane.take ? dot[i][u] : broadcast(-FAR);
        }
        best = dot[0][u];
        PS_UNROLL16 for (int i = 1; i < WT; ++i) best = dot[i][u] > best ? dot[i][u] : best;
        if (PS_RARELY(any_above(best, lane.m + load(t.rise)))) {
            const F m = best > lane.m + load(t.rise) ? best : lane.m;
            const F factor = exp2f_((lane.m - m) * scale);
            for (int g = 0; g < GROUPS; ++g)
                for (int c = 0; c < 1 + C; ++c) lane.y[g][c] *= factor;
            lane.s2 *= factor * factor;
            lane.m = m;
            set_cut(lane, scale);
        }
        for (int i = 0; i < WT; ++i) {
            const float* const value = t.block_values + (w + i) * (C + 3);
            const F l = (dot[i][u] - lane.m) * scale;
            const F e = exp2f_(l);
            const F weight = t.counts ? e * value[1] : e;
            F* const y = lane.y[(first + w + i) % GROUPS];
            y[0] += weight;
            for (int c = 0; c < C; ++c) y[1 + c] += weight * value[3 + c];
            lane.s2 += weight * e;
            if (!t.recheck) continue;
            // Priority sampling: a window of weight p and luck u is kept while p / u is among the largest.
            const F u01 = uniform(lane.luck, t.block_luck[w + i]);
            unsigned kept = above(weight, lane.cut * u01);
            while (PS_RARELY(kept)) {
                const int j = __builtin_ctz(kept);
                kept &= kept - 1;
                if (dot[i][u][j] < -FAR / 2) continue;
                const float log_weight = dot[i][u][j] * t.scale;
                const float log_size = log_weight + std::log2(lane.factor[j]) + value[2];
                Samples& samples = t.samples[t.entries[(v + u) * LANES + j].query];
                samples.add({log_size - std::log2(u01[j]), log_size, log_weight,
                             t.first_window + t.block_at[w + i]}, t.recheck);
                if (samples.threshold > lane.threshold[j]) {
                    lane.threshold[j] = samples.threshold;
                    set_cut(lane, scale);
                }
            }
        }
    }
}

// `vectors` x LANES queries of one cell against all of the cell's windows that any of them takes.
template <int C>
static void scan_cell(const CellTask& t) {
    Lane<C>* const lanes = reinterpret_cast<Lane<C>*>(t.lane_state);
    const int r = t.rank, vectors = (t.entry_count + LANES - 1) / LANES;
    const F scale = broadcast(t.scale);

    // Features of the cell's queries, axis by axis; accumulators start at the queries' own references.
    for (int v = 0; v < vectors; ++v) {
        Lane<C>& lane = lanes[v];
        alignas(64) float m[LANES], take[LANES], factor[LANES], threshold[LANES];
        const float* rows[LANES];
        for (int i = 0; i < LANES; ++i) {
            const int e = v * LANES + i;
            const bool real = e < t.entry_count;
            const Entry& entry = t.entries[real ? e : t.entry_count - 1];
            rows[i] = t.q + int64_t(entry.query) * t.q_pitch;
            m[i] = t.m[entry.query];
            take[i] = real ? float(entry.take) : 0.f;
            factor[i] = entry.factor;
            threshold[i] = real && t.recheck ? t.samples[entry.query].threshold : INFINITY;
            lane.luck[i] = t.luck[entry.query];
        }
        lane.m = load(m), lane.take = load(take), lane.factor = load(factor);
        lane.threshold = load(threshold);
        set_cut(lane, scale);
        lane.s2 = F{};
        for (int g = 0; g < GROUPS; ++g)
            for (int c = 0; c < 1 + C; ++c) lane.y[g][c] = F{};
        float* const to = t.query_features + int64_t(v) * t.q_pitch * LANES;
        for (int d = 0; d < r; d += LANES) {
            F x[LANES];
            PS_UNROLL16 for (int i = 0; i < LANES; ++i) x[i] = load(rows[i] + d);
            transpose(x);
            PS_UNROLL16 for (int i = 0; i < LANES; ++i) store(to + int64_t(d + i) * LANES, x[i]);
        }
    }

    I tail;
    for (int i = 0; i < LANES; ++i) tail[i] = r / LANES * LANES + i < r ? -1 : 0;
    const int most = t.entries[0].take;
    for (int first = 0; first < most; first += BLOCK) {
        const int count = most - first < BLOCK ? most - first : BLOCK, padded = (count + WT - 1) / WT * WT;
        for (int w = 0; w < padded; ++w) {
            float* const p = t.block + int64_t(w) * t.q_pitch;
            float* const value = t.block_values + w * (C + 3);
            if (w >= count) {
                for (int d = 0; d < r; ++d) p[d] = 0.f;
                for (int c = 0; c < C + 3; ++c) value[c] = 0.f;
                continue;
            }
            const int64_t at = t.order ? t.order[(t.start + first + w) % t.competing]
                                       : (t.start + first + w) % t.competing;
            const uint16_t* const features = t.features + at * t.stored_rank;
            F square = F{};
            int d = 0;
            for (; d + LANES <= r; d += LANES) {
                const F x = half_to_float(features + d);
                store(p + d, x);
                square += x * x;
            }
            if (d < r) {
                // Beyond the last axis other numbers follow, at the end of the file sixteen zeros.
                const F x = tail ? half_to_float(features + d) : F{};
                store(p + d, x);
                square += x * x;
            }
            value[0] = sum_of(square) / 2;
            value[1] = t.counts ? t.counts[at] : 1.f;
            value[2] = t.counts ? std::log2(t.counts[at]) : 0.f;
            for (int c = 0; c < C; ++c)
                value[3 + c] = t.value_bytes ? float(t.value_bytes[at * C + c]) * (1 / 127.5f) - 1.f
                                             : t.value_floats[at * C + c];
            t.block_at[w] = at;
            t.block_luck[w] = uint32_t((t.first_window + at) * 0xC2B2AE3Du);
        }

        const auto taken = [&](int v) {
            const int last = v < vectors ? t.entries[v * LANES].take - first : 0;
            return last < count ? last : count;
        };
        for (int v = 0; v < vectors && taken(v) > 0; v += QV) {
            // Queries that take less stand further back: two vectors together as far as both go, then one alone.
            int w = 0;
            if (QV > 1)
                for (; w < taken(v + 1); w += WT) scan_tile<C, QV>(t, lanes + v, v, first, w, r, scale);
            for (; w < taken(v); w += WT) scan_tile<C, 1>(t, lanes + v, v, first, w, r, scale);
        }
        if (t.interrupt->stopped(t.calling_thread)) return;
    }

    // Into the queries' sums.
    constexpr int PARTS = 3 + 3 * C, ROWS = (PARTS + LANES - 1) / LANES;
    F linear[ROWS];  // 1 where a part grows with the weights, 0 where with their squares
    for (int part = 0; part < ROWS * LANES; ++part)
        linear[part / LANES][part % LANES] = part == 0 || (part >= 3 && part < 3 + C) ? 1.f : 0.f;
    for (int v = 0; v < vectors; ++v) {
        const Lane<C>& lane = lanes[v];
        F c1, c2, factor, rescale;
        for (int i = 0; i < LANES; ++i) {
            const int e = v * LANES + i;
            const Entry& entry = t.entries[e < t.entry_count ? e : t.entry_count - 1];
            c1[i] = entry.c1, c2[i] = entry.c2, factor[i] = entry.factor;
            rescale[i] = t.m[entry.query];
        }
        rescale = exp2f_((rescale - lane.m) * scale);
        F sum[1 + C], squares[1 + C], cross[C];
        for (int c = 0; c < 1 + C; ++c) sum[c] = squares[c] = F{};
        for (int c = 0; c < C; ++c) cross[c] = F{};
        for (int g = 0; g < GROUPS; ++g)
            for (int c = 0; c < 1 + C; ++c) {
                sum[c] += lane.y[g][c];
                squares[c] += lane.y[g][c] * lane.y[g][c];
                if (c) cross[c - 1] += lane.y[g][0] * lane.y[g][c];
            }
        F x[ROWS * LANES];
        for (F& part : x) part = F{};
        x[0] = sum[0] * factor, x[1] = lane.s2 * factor, x[2] = c1 * squares[0] + c2 * sum[0] * sum[0];
        for (int c = 0; c < C; ++c) {
            x[3 + c] = sum[1 + c] * factor;
            x[3 + C + c] = c1 * cross[c] + c2 * sum[0] * sum[1 + c];
            x[3 + 2 * C + c] = c1 * squares[1 + c] + c2 * sum[1 + c] * sum[1 + c];
        }
        for (int row = 0; row < ROWS; ++row) {
            F block[LANES];
            PS_UNROLL16 for (int i = 0; i < LANES; ++i) block[i] = x[row * LANES + i];
            transpose(block);
            for (int i = 0; i < LANES && v * LANES + i < t.entry_count; ++i) {
                const int query = t.entries[v * LANES + i].query;
                const float f = rescale[i];
                const F factors = f * f + linear[row] * (f - f * f);
                float* const to = t.sums + (int64_t(query) * ROWS + row) * LANES;
                store(to, load(to) * factors + block[i]);
            }
        }
        for (int i = 0; i < LANES && v * LANES + i < t.entry_count; ++i)
            t.m[t.entries[v * LANES + i].query] = lane.m[i];
    }
}

// share = e^(expected - top), at least e^-80.
static void exponentials(const float* expected, int64_t cells, float top, float* share) {
    constexpr float BITS = 1.44269504f;
    for (int64_t c = 0; c < cells; c += LANES) {
        F x = (load(expected + c) - top) * BITS;
        x = x > -115.f ? x : broadcast(-115.f);
        store(share + c, exp2f_(x));
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

// Cells that get more than the floor, or at least `GROUPS` windows anyway.
static int64_t active_cells(const float* share, const float* always, int64_t cells, float t, float floor,
                            int32_t* active) {
    int64_t count = 0;
    for (int64_t c = 0; c < cells; c += LANES) {
        unsigned bits = above(load(share + c) * t, broadcast(floor)) | above(load(always + c), F{});
        while (bits) {
            const int i = __builtin_ctz(bits);
            bits &= bits - 1;
            if (c + i < cells) active[count++] = int32_t(c + i);
        }
    }
    return count;
}

// log E[w^2] of a normal cell: a kernel of half the variance.
static float log_squared(const float* q, const float* mean, const float* variance, int rank, float half) {
    F product = broadcast(1.f), sum = F{};
    float logs = 0;
    int d = 0;
    for (; d + LANES <= rank; d += LANES) {
        const F spread = load(variance + d) + half, apart = load(q + d) - load(mean + d);
        sum += apart * apart / spread;
        product *= spread / half;
        if (any_above(product, broadcast(1e20f))) {
            for (int i = 0; i < LANES; ++i) logs += std::log(product[i]);
            product = broadcast(1.f);
        }
    }
    for (; d < rank; ++d) {
        const float spread = variance[d] + half, apart = q[d] - mean[d];
        sum[0] += apart * apart / spread;
        product[d % LANES] *= spread / half;
    }
    double all = 1;
    for (int i = 0; i < LANES; ++i) all *= double(product[i]);  // up to 1e20 each
    return -0.5f * (logs + float(std::log(all)) + sum_of(sum));
}

// |window - image|^2 over rows that lie inside: `bytes` or `floats` point at the window's first pixel.
static float distance2(const WindowTask& t) {
    F total = F{};
    const float* w = t.window;
    for (int c = 0; c < t.channels; ++c)
        for (int i = 0; i < t.size; ++i, w += t.pitch) {
            const bool inside = i >= t.row0 && i < t.row1;
            const int64_t at = t.at + (int64_t(c) * t.height + i) * t.width;
            for (int v = 0; v < t.pitch; v += LANES) {
                F x = F{};
                if (inside && t.bytes) {
                    typedef uint8_t B __attribute__((vector_size(16)));
                    B raw;
                    __builtin_memcpy(&raw, t.bytes + at + v, sizeof raw);
                    x = (__builtin_convertvector(raw, F) * (1 / 127.5f) - 1.f) * load(t.inside + v);
                } else if (inside) {
                    x = load(t.floats + at + v) * load(t.inside + v);
                }
                const F d = (load(w + v) - x) * load(t.mask + v);
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
