// The sliding kernel, compiled once per level and precision (levels-inl.h).
//
// A squared window distance is a sum over k columns and k rows of squared pixel differences. Along a diagonal both sums
// slide: a window of k steps is a suffix of one block of k steps plus a prefix of the next (van Herk), so any k costs
// three additions an axis. Nothing is ever subtracted, so a small distance has no rounding error of large ones.

// a + b on the multiplication pipe, for code in which additions wait for each other while it idles.
PS_INLINE F plus(F a, F b) { return fma(a, broadcast(1), b); }

// Rows outside: the noisy image wraps around or is zero; training rows are read there only where both are zero.
PS_INLINE const Real* query_row(const Task<Real>& t, int row) {
    if (t.circular) row = (row % t.height + t.height) % t.height;
    const bool inside = row >= 0 && row < t.height;
    return t.q + int64_t(inside ? row : t.height) * t.q_pitch + t.q_margin * t.channels;
}

PS_INLINE const Real* window_row(const Task<Real>& t, int row) {
    const bool inside = row >= 0 && row < t.image_height;
    return t.p + int64_t(inside ? row : t.image_height) * t.image_width * t.channels * LANES;
}

// What is summed along diagonals: squared differences, or products of a pixel of a training image and one of the other.
enum Terms { SQUARES, PRODUCTS };

// Along one diagonal: terms e of `U` neighbouring displacements at one training column.
template <Terms TERMS, int C, int U>
PS_INLINE void add_terms(F (&e)[U], const Real* q, const Real* p, int channels) {
    const int n = C ? C : channels;
    for (int c = 0; c < n; ++c) {
        const F pixel = load(p + c * LANES);
        for (int u = 0; u < U; ++u) {
            const F query = broadcast(q[c - u * n]);
            e[u] = TERMS == PRODUCTS ? fma(pixel, query, e[u]) : fma(pixel - query, pixel - query, e[u]);
        }
    }
}

template <Terms TERMS, int C, int U>
PS_INLINE void terms(F (&e)[U], const Real* q, const Real* p, int channels) {
    const int n = C ? C : channels;
    for (int u = 0; u < U; ++u) {
        const F pixel = load(p), query = broadcast(q[-u * n]);
        e[u] = TERMS == PRODUCTS ? pixel * query : (pixel - query) * (pixel - query);
    }
    for (int c = 1; c < n; ++c) {
        const F pixel = load(p + c * LANES);
        for (int u = 0; u < U; ++u) {
            const F query = broadcast(q[c - u * n]);
            e[u] = TERMS == PRODUCTS ? fma(pixel, query, e[u]) : fma(pixel - query, pixel - query, e[u]);
        }
    }
}

// What a row of horizontal window sums h does to the vertical sums.
enum Into {
    SET,       // to = h
    ADD,       // to = from + h
    SET_KEEP,  // to = keep = h
    ADD_KEEP,  // to = from + h, keep = h
};

struct Rows {
    Real* to;
    const Real* from;
    Real* keep;
};

template <Into INTO>
PS_INLINE void put(const Rows& rows, int64_t at, F h) {
    if (INTO == SET_KEEP || INTO == ADD_KEEP) store(rows.keep + at, h);
    if (INTO == ADD || INTO == ADD_KEEP) h = load(rows.from + at) + h;
    store(rows.to + at, h);
}

// The horizontal window sums of one pair of rows (query row q, training row p) on `U` neighbouring diagonals.
// K = 1, 3, 5 keep the few partial sums in registers; K = 0 takes any k by blocks.
template <Terms TERMS, int C, int K, int U, Into INTO>
PS_INLINE void slide(const Task<Real>& t, const Panel& panel, const Diagonals& d, const Real* q, const Real* p,
                     const Rows& rows) {
    const int n = C ? C : t.channels;
    const int k = K ? K : t.patch_size, r = k / 2;
    const int windows = d.last - d.first;
    // Step x is training column first - r + x; the window that ends there is number x - k + 1.
    q += int64_t(d.first - r - d.displacement) * n;
    p += int64_t(d.first - r) * n * LANES;
    const int64_t* state_of = panel.state_of.data() + (d.first - d.displacement - panel.lowest);
    const int64_t column = (d.first - panel.cols.w0) * LANES;
    const Rows at = {rows.to + column, INTO == SET || INTO == SET_KEEP ? nullptr : rows.from + column,
                     INTO == SET || INTO == ADD ? nullptr : rows.keep + column};
    auto emit = [&](int64_t window, const F(&h)[U]) PS_LAMBDA {
        PS_EACH(U) put<INTO>(at, state_of[window - i] + window * LANES, h[i]);
    };

    if (K > 0) {
        constexpr int HELD = K > 1 ? K - 1 : 1;
        F sums[HELD][U];  // sums[i]: the last i + 1 squares
        for (int i = 0; i < HELD; ++i)
            for (int u = 0; u < U; ++u) sums[i][u] = broadcast(0);
        for (int x = 0; x < windows + K - 1; ++x) {
            F e[U], h[U];
            terms<TERMS, C, U>(e, q + x * n, p + int64_t(x) * n * LANES, n);
            PS_EACH(U) h[i] = K > 1 ? plus(sums[HELD - 1][i], e[i]) : e[i];
            for (int held = HELD - 1; held > 0; --held) PS_EACH(U) sums[held][i] = sums[held - 1][i] + e[i];
            PS_EACH(U) sums[0][i] = e[i];
            if (x >= K - 1) emit(x - K + 1, h);
        }
        return;
    }

    Real* const suffix = t.scratch;  // [k + 1][U][LANES]; entry k stays zero
    F h[U];
    for (int u = 0; u < U; ++u) h[u] = broadcast(0);
    for (int u = 0; u < U; ++u) store(suffix + (k * U + u) * LANES, h[u]);
    // First block, backwards: suffix sums only.
    for (int x = k - 1; x >= 0; --x) {
        add_terms<TERMS, C, U>(h, q + x * n, p + int64_t(x) * n * LANES, n);
        if (x < windows)
            for (int u = 0; u < U; ++u) store(suffix + (x * U + u) * LANES, h[u]);
    }
    emit(0, h);
    // Every further block, forwards: window = suffix of the block before + prefix of this one.
    for (int start = k; start < windows + k - 1; start += k) {
        F prefix[U];
        for (int u = 0; u < U; ++u) prefix[u] = broadcast(0);
        const int end = start + k < windows + k - 1 ? start + k : windows + k - 1;
        if (start >= windows) {
            for (int x = start; x < end; ++x) {
                add_terms<TERMS, C, U>(prefix, q + x * n, p + int64_t(x) * n * LANES, n);
                for (int u = 0; u < U; ++u) h[u] = prefix[u] + load(suffix + ((x - start + 1) * U + u) * LANES);
                emit(x - k + 1, h);
            }
            break;
        }
        // Windows start in this block too: its squares replace the suffixes that were used.
        for (int x = start; x < end; ++x) {
            F e[U];
            terms<TERMS, C, U>(e, q + x * n, p + int64_t(x) * n * LANES, n);
            for (int u = 0; u < U; ++u) {
                prefix[u] = prefix[u] + e[u];
                h[u] = prefix[u] + load(suffix + ((x - start + 1) * U + u) * LANES);
                store(suffix + ((x - start) * U + u) * LANES, e[u]);
            }
            emit(x - k + 1, h);
        }
        for (int u = 0; u < U; ++u) h[u] = broadcast(0);
        for (int x = k - 1; x > 0; --x)
            for (int u = 0; u < U; ++u) {
                h[u] = h[u] + load(suffix + (x * U + u) * LANES);
                store(suffix + (x * U + u) * LANES, h[u]);
            }
    }
}

// The same where every query column meets its own column only: one diagonal, continued by zeros on both sides.
template <Terms TERMS, int C, Into INTO>
PS_INLINE void slide_locked(const Task<Real>& t, const Panel& panel, const Real* q, const Real* p, const Rows& rows) {
    const int n = C ? C : t.channels;
    const int k = t.patch_size, r = k / 2, windows = panel.cols.queries(), steps = windows + k - 1;
    const int first = panel.cols.q0 - r;
    Real* const squared = t.scratch;
    Real* const suffix = squared + int64_t(steps) * LANES;
    for (int x = 0; x < steps; ++x) {
        F e[1] = {broadcast(0)};
        const int column = first + x;
        if (column >= 0 && column < t.width) terms<TERMS, C, 1>(e, q + column * n, p + int64_t(column) * n * LANES, n);
        store(squared + int64_t(x) * LANES, e[0]);
    }
    for (int start = 0; start < windows; start += k) {
        F sum = broadcast(0);
        for (int x = start + k - 1; x >= start; --x) {
            sum = sum + load(squared + int64_t(x) * LANES);
            store(suffix + int64_t(x) * LANES, sum);
        }
        put<INTO>(rows, int64_t(start) * LANES, sum);
        F prefix = broadcast(0);
        for (int window = start + 1; window < start + k && window < windows; ++window) {
            prefix = prefix + load(squared + int64_t(window + k - 1) * LANES);
            put<INTO>(rows, int64_t(window) * LANES, load(suffix + int64_t(window) * LANES) + prefix);
        }
    }
}

template <Terms TERMS, int C, int K, Into INTO>
static void slide_row(const Task<Real>& t, const Panel& panel, int query, int window, const Rows& rows) {
    const Real *q = query_row(t, query), *p = window_row(t, window);
    if (panel.cols.locked) {
        slide_locked<TERMS, C, INTO>(t, panel, q, p, rows);
        return;
    }
    for (const Diagonals& d : panel.diagonals) {
        if (d.count == NEIGHBOURS)
            slide<TERMS, C, K, NEIGHBOURS, INTO>(t, panel, d, q, p, rows);
        else
            slide<TERMS, C, K, 1, INTO>(t, panel, d, q, p, rows);
    }
}

// Makes `to`, a squared distance, the query's reference and rescales its sums to it.
static void refer_to(const Task<Real>& t, double to, Real* lanes, int pixel) {
    const double nearer = to - t.reference[pixel], factor = std::exp2(nearer * double(t.scale));
    const int parts = t.parts().count();
    double* sums = t.sums + int64_t(pixel) * parts;
    if (t.moments) {  // reference - distance^2 of every window changes by the same amount
        Real* sl = lanes + 2 * LANES;
        sums[2] += nearer * sums[0];
        store(sl, fma(broadcast(Real(nearer)), load(lanes), load(sl)));
    }
    for (int part = 0; part < parts; ++part) {
        const double by = part == 1 ? factor * factor : factor;
        sums[part] *= by;
        store(lanes + part * LANES, load(lanes + part * LANES) * broadcast(Real(by)));
    }
    t.reference[pixel] = to;
}

// The same for every query of a task. A double is exact enough at any distance.
constexpr bool EXACT = sizeof(Real) == 8;
// log2 of the least weight, which is negligible even times ABSENT_PIXEL.
constexpr int LOWEST_BITS = EXACT ? -1000 : -120;

struct Scale {
    F scale, negligible, rise, lowest;
    Real distant, reach;
};

PS_INLINE Scale scale_of(const Task<Real>& t) {
    return {broadcast(t.scale),
            broadcast(t.negligible),
            broadcast(RISE_BITS / t.scale),
            broadcast(LOWEST_BITS / t.scale),
            Real(DISTANT_BITS) / t.scale,
            Real(1 + t.rounding)};
}

// The query's own pixel, within the range of training pixels. The values of windows with weight lie near it, so squares
// of differences from it lose no digits by cancellation.
PS_INLINE Real centre_of(const Task<Real>& t, int pixel, int channel) {
    const Real value = query_row(t, pixel / t.width)[pixel % t.width * t.channels + channel];
    return value < -1 ? Real(-1) : value > 1 ? Real(1) : value;
}

// Stride between the sums of queries in the lanes, in numbers.
template <bool MOMENTS>
PS_INLINE constexpr int64_t pitch_of(int channels) {
    return int64_t(MOMENTS ? 3 + 2 * channels : 2 + channels) * LANES;
}

// One query's sums, held in registers while it meets the windows of one training row.
template <int C, bool MOMENTS>
struct Query {
    static constexpr int FIRST = MOMENTS ? 3 : 2, STEP = MOMENTS ? 2 : 1;  // where values stand (Parts)
    static constexpr int SECOND = MOMENTS && C ? C : 1;
    Real* lanes;
    int pixel;
    bool distant;            // so far from all windows that float32 distances are not exact enough
    F reference, far, near;  // beyond `far` a window weighs nothing, nearer than `near` too much
    F s, s2, v[C ? C : 1];
    F sl, v2[SECOND], centre[SECOND];  // with moments
};

template <int C, bool MOMENTS>
PS_INLINE void open(Query<C, MOMENTS>& query, const Task<Real>& t, const Scale& by, Real* lanes, int pixel) {
    query.lanes = lanes;
    query.pixel = pixel;
    const Real reference = Real(t.reference[pixel]);
    query.reference = broadcast(reference);
    query.distant = !EXACT && reference > by.distant;
    // Margin for the rounding of distances, which exceeds the range of weights as sigma vanishes.
    query.far = broadcast(reference * by.reach) - by.negligible;
    query.near = query.reference - by.rise;
    query.s = load(lanes);
    query.s2 = load(lanes + LANES);
    const Real* values = lanes + query.FIRST * LANES;
    for (int c = 0; c < C; ++c) query.v[c] = load(values + c * query.STEP * LANES);
    if (!MOMENTS) return;
    query.sl = load(lanes + 2 * LANES);
    for (int c = 0; c < C; ++c) {
        query.v2[c] = load(values + (2 * c + 1) * LANES);
        query.centre[c] = broadcast(centre_of(t, pixel, c));
    }
}

template <int C, bool MOMENTS>
PS_INLINE void close(const Query<C, MOMENTS>& query) {
    store(query.lanes, query.s);
    store(query.lanes + LANES, query.s2);
    Real* values = query.lanes + query.FIRST * LANES;
    for (int c = 0; c < C; ++c) store(values + c * query.STEP * LANES, query.v[c]);
    if (!MOMENTS) return;
    store(query.lanes + 2 * LANES, query.sl);
    for (int c = 0; c < C; ++c) store(values + (2 * c + 1) * LANES, query.v2[c]);
}

// A training pixel as it was before rounding.
PS_INLINE double exact_pixel(const Task<Real>& t, Real p) {
    return t.pixels_of_bytes ? std::nearbyint((double(p) + 1) * 127.5) / 127.5 - 1 : double(p);
}

// The distance by its definition, in float64.
PS_COLD double exact_distance(const Task<Real>& t, int pixel, int64_t window, int lane) {
    const int n = t.channels, r = t.patch_size / 2;
    const int i = pixel / t.width, j = pixel % t.width, a = int(window / t.image_width),
              b = int(window % t.image_width);
    double total = 0;
    for (int y = -r; y <= r; ++y) {
        const Real *q = query_row(t, i + y) + int64_t(j - r) * n, *p = window_row(t, a + y);
        for (int x = -r; x <= r; ++x)
            for (int c = 0; c < n; ++c, ++q) {
                const bool inside = a + y >= 0 && a + y < t.image_height && b + x >= 0 && b + x < t.image_width;
                const double value = inside ? exact_pixel(t, p[(int64_t(b + x) * n + c) * LANES + lane]) : 0.0;
                total += (double(*q) - value) * (double(*q) - value);
            }
    }
    return total;
}

// A window is much nearer than the reference: it becomes the reference.
PS_COLD void lower_reference(const Task<Real>& t, const F* distance, int count, const Real* values, Real* lanes,
                             int pixel) {
    Real each[LANES];
    double nearest = t.reference[pixel];
    int64_t window = 0;
    int which = 0;
    for (int i = 0; i < count; ++i) {
        store(each, distance[i]);
        for (int lane = 0; lane < LANES; ++lane)
            if (double(each[lane]) < nearest) {
                nearest = double(each[lane]);
                window = (values - t.p) / (t.channels * LANES) + i;
                which = lane;
            }
    }
    if (!EXACT && nearest * double(t.scale) > DISTANT_BITS && t.exact_left[pixel] >= 0)
        nearest = exact_distance(t, pixel, window, which);
    if (nearest < t.reference[pixel]) refer_to(t, nearest, lanes, pixel);
}

// Where even the nearest window is thousands of nats away, its float32 distance is off by more than 1e-4 nats. Few
// windows matter there as a rule, and they are added to the float64 sums by exact distances. Where too many matter, the
// query is left to the float64 kernel.
PS_COLD void weigh_exactly(const Task<Real>& t, int pixel, F far, const F* distance, int count, const Real* values,
                           Real* lanes) {
    int& left = t.exact_left[pixel];
    if (left < 0) return;
    Real each[LANES], limit[LANES];
    store(limit, far);
    const Parts parts = t.parts();
    double* sums = t.sums + int64_t(pixel) * parts.count();
    for (int i = 0; i < count; ++i) {
        store(each, distance[i]);
        for (int lane = 0; lane < LANES; ++lane) {
            if (!(each[lane] < limit[0])) continue;
            if (--left < 0) return;
            const double exact = exact_distance(t, pixel, (values - t.p) / (t.channels * LANES) + i, lane);
            if (exact < t.reference[pixel]) refer_to(t, exact, lanes, pixel);
            const double w = std::exp2((t.reference[pixel] - exact) * double(t.scale));
            sums[0] += w;
            sums[1] += w * w;
            if (t.moments) sums[2] += w * (t.reference[pixel] - exact);
            for (int c = 0; c < t.channels; ++c) {
                const double value = double(values[(int64_t(i) * t.channels + c) * LANES + lane]);
                sums[parts.value(c)] += w * value;
                if (t.moments) sums[parts.value(c) + 1] += w * value * value;
            }
        }
    }
}

// Adds COUNT windows at these squared distances, centred at neighbouring training columns with pixels `values`.
template <int C, bool MOMENTS, int COUNT>
PS_INLINE void weigh(Query<C, MOMENTS>& query, const Task<Real>& t, const Scale& by, const F (&distance)[COUNT],
                     const Real* values) {
    const int n = C ? C : t.channels;
    F nearest = distance[0];
    if (COUNT == 4) nearest = minimum(minimum(distance[0], distance[1]), minimum(distance[2], distance[3]));
    if (!any_above(query.far, nearest)) return;
    F x[COUNT], w[COUNT];
    if (PS_RARELY(query.distant || any_above(query.near, nearest))) {
        F all[COUNT];
        PS_EACH(COUNT) all[i] = distance[i];
        close(query);
        if (any_above(query.near, nearest)) {
            lower_reference(t, all, COUNT, values, query.lanes, query.pixel);
            open(query, t, by, query.lanes, query.pixel);
        }
        if (query.distant) {
            weigh_exactly(t, query.pixel, query.far, all, COUNT, values, query.lanes);
            open(query, t, by, query.lanes, query.pixel);
            return;
        }
    }
    PS_EACH(COUNT) x[i] = query.reference - distance[i];
    exp2_scaled(w, x, by.scale, by.lowest);
    // The square of an absent pixel exceeds the inverse of the least weight, so its weight has to be 0 here.
    if (MOMENTS && PS_RARELY(t.pixels_absent)) PS_EACH(COUNT) w[i] = x[i] > by.lowest ? w[i] : broadcast(0);
    if (COUNT == 4)
        query.s = query.s + ((w[0] + w[1]) + (w[2] + w[3]));
    else
        for (int i = 0; i < COUNT; ++i) query.s = query.s + w[i];
    PS_EACH(COUNT) query.s2 = fma(w[i], w[i], query.s2);
    if (MOMENTS) PS_EACH(COUNT) query.sl = fma(w[i], maximum(x[i], by.lowest), query.sl);
    if (MOMENTS)
        for (int c = 0; c < C; ++c) PS_EACH(COUNT) {
                const F offset = load(values + (int64_t(i) * n + c) * LANES) - query.centre[c];
                const F weighted = w[i] * offset;
                query.v[c] = query.v[c] + weighted;
                query.v2[c] = fma(weighted, offset, query.v2[c]);
            }
    PS_EACH(COUNT) {
        const Real* value = values + int64_t(i) * n * LANES;
        if (!MOMENTS)
            for (int c = 0; c < C; ++c) query.v[c] = fma(w[i], load(value + c * LANES), query.v[c]);
        if (C == 0)
            for (int c = 0; c < n; ++c) {
                Real* sum = query.lanes + (query.FIRST + c * query.STEP) * LANES;
                F pixel = load(value + c * LANES);
                if (MOMENTS) {
                    pixel = pixel - broadcast(centre_of(t, query.pixel, c));
                    store(sum + LANES, fma(w[i] * pixel, pixel, load(sum + LANES)));
                }
                store(sum, fma(w[i], pixel, load(sum)));
            }
    }
}

// Window row `a` has become complete for query row `i`: adds its pairs to the sums of that row's queries. Squared
// distances are sums of `ROWS` state rows.
template <int C, bool MOMENTS, int ROWS>
static void evaluate(const Task<Real>& t, const Panel& panel, const Real* const (&state)[ROWS], int row_of_queries,
                     int row_of_windows) {
    const int n = C ? C : t.channels;
    const Axis& cols = panel.cols;
    const int queries = cols.queries(), entries = panel.entries;
    const int64_t pitch = pitch_of<MOMENTS>(n);
    Real* lanes = t.lanes + (panel.first_query + int64_t(row_of_queries - panel.rows.q0) * queries) * pitch;
    const Real* values = t.p + (int64_t(row_of_windows) * t.image_width + cols.w0) * n * LANES;
    const Scale by = scale_of(t);
    for (int j = 0; j < queries; ++j, lanes += pitch) {
        Query<C, MOMENTS> query;
        open(query, t, by, lanes, row_of_queries * t.width + cols.q0 + j);
        if (cols.locked) {
            F distance[1] = {load(state[0] + int64_t(j) * LANES)};
            for (int row = 1; row < ROWS; ++row) distance[0] = distance[0] + load(state[row] + int64_t(j) * LANES);
            weigh<C, MOMENTS, 1>(query, t, by, distance, values + int64_t(j) * n * LANES);
        } else {
            const int64_t at = int64_t(j + MARGIN) * panel.pitch * LANES;
            for (int entry = 0; entry < entries; entry += GROUP) {
                F distance[GROUP];
                PS_EACH(GROUP) distance[i] = load(state[0] + at + (entry + i) * LANES);
                for (int row = 1; row < ROWS; ++row) PS_EACH(GROUP) {
                        const F more = load(state[row] + at + (entry + i) * LANES);
                        distance[i] = row % 2 ? plus(more, distance[i]) : distance[i] + more;
                    }
                weigh<C, MOMENTS, GROUP>(query, t, by, distance, values + int64_t(entry) * n * LANES);
            }
        }
        close(query);
    }
}

// Two window rows, `a` and a + 1, that became complete for two query rows: K + 1 state rows serve both, and the
// K - 1 rows between are read and added once.
template <int C, bool MOMENTS, int K>
static void evaluate_two(const Task<Real>& t, const Panel& panel, const Real* const (&state)[K + 1], int upper_row,
                         int lower_row, int a) {
    const int n = C ? C : t.channels;
    const Axis& cols = panel.cols;
    const int queries = cols.queries(), entries = panel.entries;
    const int64_t pitch = pitch_of<MOMENTS>(n);
    const int64_t row_of_lanes = queries * pitch, row_of_values = int64_t(t.image_width) * n * LANES;
    Real* const lanes = t.lanes + panel.first_query * pitch;
    Real* upper_lanes = lanes + (upper_row - panel.rows.q0) * row_of_lanes;
    Real* lower_lanes = lanes + (lower_row - panel.rows.q0) * row_of_lanes;
    const Real* values = t.p + a * row_of_values + int64_t(cols.w0) * n * LANES;
    const Scale by = scale_of(t);
    for (int j = 0; j < queries; ++j, upper_lanes += pitch, lower_lanes += pitch) {
        Query<C, MOMENTS> upper, lower;
        open(upper, t, by, upper_lanes, upper_row * t.width + cols.q0 + j);
        open(lower, t, by, lower_lanes, lower_row * t.width + cols.q0 + j);
        const int64_t at = int64_t(j + MARGIN) * panel.pitch * LANES;
        for (int entry = 0; entry < entries; entry += GROUP) {
            const int64_t here = at + entry * LANES;
            F first[GROUP], second[GROUP];
            PS_EACH(GROUP) second[i] = load(state[1] + here + i * LANES);
            for (int row = 2; row < K; ++row)
                PS_EACH(GROUP) second[i] = second[i] + load(state[row] + here + i * LANES);
            PS_EACH(GROUP) first[i] = plus(load(state[0] + here + i * LANES), second[i]);
            PS_EACH(GROUP) second[i] = second[i] + load(state[K] + here + i * LANES);
            weigh<C, MOMENTS, GROUP>(upper, t, by, first, values + int64_t(entry) * n * LANES);
            weigh<C, MOMENTS, GROUP>(lower, t, by, second, values + row_of_values + int64_t(entry) * n * LANES);
        }
        close(upper);
        close(lower);
    }
}

// Adds the lanes of every query of the panel to its float64 sums.
static void flush(const Task<Real>& t, const Panel& panel) {
    const int parts = t.parts().count(), queries = panel.cols.queries();
    Real* lanes = t.lanes + panel.first_query * parts * LANES;
    for (int i = panel.rows.q0; i < panel.rows.q1; ++i)
        for (int j = 0; j < queries; ++j) {
            double* sums = t.sums + (int64_t(i) * t.width + panel.cols.q0 + j) * parts;
            double s = 0, offsets = 0;  // of values from the query's centre
            for (int part = 0; part < parts; ++part, lanes += LANES) {
                Real total[LANES];
                for (int l = 0; l < LANES; ++l) total[l] = l < t.present ? lanes[l] : 0;
                for (int half = LANES / 2; half > 0; half /= 2)
                    for (int l = 0; l < half; ++l) total[l] += total[l + half];
                double sum = double(total[0]);
                if (part == 0) s = sum;
                if (t.moments && part >= 3) {
                    const double centre = double(centre_of(t, i * t.width + panel.cols.q0 + j, (part - 3) / 2));
                    const bool squares = part % 2 == 0;
                    if (!squares) offsets = sum;
                    sum += squares ? centre * (2 * offsets + centre * s) : centre * s;
                }
                sums[part] += sum;
                store(lanes, broadcast(0));
            }
        }
}

// Pairs beyond the last window of a query read FAR and weigh nothing.
static void fill_tails(const Task<Real>& t, const Panel& panel, Real with = Real(FAR)) {
    if (panel.cols.locked) return;
    for (int64_t row = 0; row < (1 + panel.slots) * (panel.state_row / panel.pitch); ++row)
        for (int i = panel.entries; i < panel.pitch; ++i)
            store(t.state + (row * panel.pitch + i) * LANES, broadcast(with));
}

// Small patches: the sums of the last K rows are added afresh for every window, two windows at a time.
template <int C, bool MOMENTS, int K>
static bool slide_few(const Task<Real>& t, const Panel& panel, const Run& run) {
    auto slot = [&](int row) PS_LAMBDA { return t.state + (1 + row % (K + 1)) * panel.state_row * LANES; };
    auto query = [&](int window) PS_LAMBDA { return (run.query + window) % t.height; };
    for (int x = 0; x < run.length + K - 1; ++x) {
        if (t.interrupt->stopped_soon(t.calling_thread)) return false;
        slide_row<SQUARES, C, K, SET>(t, panel, run.query - K / 2 + x, run.window - K / 2 + x,
                                      {slot(x), nullptr, nullptr});
        const int window = x - (K - 1);
        if (K > 1 && window % 2 == 1) {
            const Real* rows[K + 1];
            for (int row = 0; row <= K; ++row) rows[row] = slot(window - 1 + row);
            evaluate_two<C, MOMENTS, K>(t, panel, rows, query(window - 1), query(window), run.window + window - 1);
        } else if (window >= 0 && (K == 1 || window == run.length - 1)) {
            const Real* rows[K];
            for (int row = 0; row < K; ++row) rows[row] = slot(window + row);
            evaluate<C, MOMENTS, K>(t, panel, rows, query(window), run.window + window);
        }
    }
    return true;
}

// Adds the pairs of a run's rows to the posterior sums.
template <int C, bool MOMENTS>
struct Summing {
    const Task<Real>& t;
    const Panel& panel;

    template <int ROWS>
    void row(const Real* const (&state)[ROWS], int row_of_queries, int row_of_windows, int) {
        evaluate<C, MOMENTS, ROWS>(t, panel, state, row_of_queries, row_of_windows);
    }
};

// One run of rows: window sums of k rows slide along it as those of columns do, with whole state rows as elements.
// `meet` takes each row of windows as it becomes complete: state rows to add up, its two rows and its number in the
// run.
template <int C, Terms TERMS, typename Meet>
static bool slide_run(const Task<Real>& t, const Panel& panel, const Run& run, Meet& meet) {
    const int k = t.patch_size, r = k / 2, windows = run.length, steps = windows + k - 1;
    const int64_t size = panel.state_row * LANES;
    Real* const prefix = t.state;
    auto slot = [&](int i) PS_LAMBDA { return t.state + (1 + i) * size; };
    auto query = [&](int window) PS_LAMBDA { return (run.query + window) % t.height; };
    auto stop = [&]() PS_LAMBDA { return t.interrupt->stopped_soon(t.calling_thread); };

    // First block, backwards: suffix sums only; rows past the last window gather in its slot.
    const int last = (windows < k ? windows : k) - 1;
    for (int x = k - 1; x >= 0; --x) {
        if (stop()) return false;
        const int y = run.query - r + x, a = run.window - r + x;
        if (x == k - 1)
            slide_row<TERMS, C, 0, SET>(t, panel, y, a, {slot(last), nullptr, nullptr});
        else
            slide_row<TERMS, C, 0, ADD>(t, panel, y, a,
                                        {slot(x < last ? x : last), slot(x < last ? x + 1 : last), nullptr});
    }
    const Real* first_row[1] = {slot(0)};
    meet.template row<1>(first_row, query(0), run.window, 0);
    // Further blocks, forwards.
    for (int start = k; start < steps; start += k) {
        const bool keep = start < windows;
        for (int x = start; x < start + k && x < steps; ++x) {
            if (stop()) return false;
            const int y = run.query - r + x, a = run.window - r + x;
            const Rows rows = {prefix, prefix, keep ? slot(x - start) : nullptr};
            if (x == start && keep)
                slide_row<TERMS, C, 0, SET_KEEP>(t, panel, y, a, rows);
            else if (x == start)
                slide_row<TERMS, C, 0, SET>(t, panel, y, a, rows);
            else if (keep)
                slide_row<TERMS, C, 0, ADD_KEEP>(t, panel, y, a, rows);
            else
                slide_row<TERMS, C, 0, ADD>(t, panel, y, a, rows);
            const int window = x - k + 1;
            if (x == start + k - 1) {
                const Real* rows1[1] = {prefix};
                meet.template row<1>(rows1, query(window), run.window + window, window);
            } else {
                const Real* rows2[2] = {prefix, slot(x - start + 1)};
                meet.template row<2>(rows2, query(window), run.window + window, window);
            }
        }
        if (!keep) break;
        for (int x = k - 2; x > 0; --x) {
            Real *to = slot(x), *from = slot(x + 1);
            for (int64_t i = 0; i < size; i += LANES) store(to + i, load(to + i) + load(from + i));
        }
    }
    return true;
}

template <int C, bool MOMENTS>
static bool sum_run(const Task<Real>& t, const Panel& panel, const Run& run) {
    if constexpr (!EXACT) {
        const int k = panel.cols.locked ? 0 : t.patch_size;
        if (k == 1) return slide_few<C, MOMENTS, 1>(t, panel, run);
        if (k == 3) return slide_few<C, MOMENTS, 3>(t, panel, run);
        if (k == 5) return slide_few<C, MOMENTS, 5>(t, panel, run);
    }
    Summing<C, MOMENTS> summing = {t, panel};
    return slide_run<C, SQUARES>(t, panel, run, summing);
}

template <int C, bool MOMENTS>
static void panel_of_channels(const Task<Real>& t, const Panel& panel) {
    fill_tails(t, panel);
    int pairs = 0;
    for (const Run& run : panel.runs) {
        if (!sum_run<C, MOMENTS>(t, panel, run)) return;
        pairs += panel.entries;
        if (pairs >= PAIRS_A_FLUSH) {
            flush(t, panel);
            pairs = 0;
        }
    }
    if (t.flush_at_end) flush(t, panel);
}

static void panel_entry(const Task<Real>& t, const Panel& panel) {
    switch (t.channels) {
        case 1:
            return t.moments ? panel_of_channels<1, true>(t, panel) : panel_of_channels<1, false>(t, panel);
        case 3:
            return t.moments ? panel_of_channels<3, true>(t, panel) : panel_of_channels<3, false>(t, panel);
        case 4:
            if (!t.moments) return panel_of_channels<EXACT ? 0 : 4, false>(t, panel);
            return panel_of_channels<0, true>(t, panel);
        default:
            return t.moments ? panel_of_channels<0, true>(t, panel) : panel_of_channels<0, false>(t, panel);
    }
}

// Transposes images to [row][column][channel][lane], a few pixels at a time so that both sides stay in the L1 cache.
template <typename Value, typename Raw>
static void pack_block(const Images& images, int64_t start, int count, Real* block, const Value& value, const Raw*) {
    const int n = images.channels;
    const int64_t pixels = int64_t(images.height) * images.width;
    constexpr int TILE = 16;
    for (const Span& span : images.pixels)
        for (int tile = span.begin; tile < span.end; tile += TILE) {
            const int end = tile + TILE < span.end ? tile + TILE : span.end;
            for (int l = 0; l < LANES; ++l) {
                const Raw* image = static_cast<const Raw*>(images.data);
                if (l < count) image += images.index(start + l) * n * pixels;
                for (int64_t x = tile; x < end; ++x) {
                    const int64_t at = images.turned ? x % images.width * images.height + x / images.width : x;
                    for (int c = 0; c < n; ++c)
                        block[(x * n + c) * LANES + l] = l < count ? value(image[c * pixels + at]) : Real(ABSENT_PIXEL);
                }
            }
        }
}

static void pack(const Images& images, int64_t start, int count, Real* block) {
    Real of_byte[256];
    for (int u = 0; u < 256; ++u) of_byte[u] = Real(images.value_of_byte[u]);
    const auto looked_up = [&](uint8_t raw) { return of_byte[raw]; };
    const auto rounded = [](auto raw) { return Real(raw); };
    switch (images.pixel_bytes) {
        case 1:
            return pack_block(images, start, count, block, looked_up, static_cast<const uint8_t*>(nullptr));
        case 4:
            return pack_block(images, start, count, block, rounded, static_cast<const float*>(nullptr));
        default:
            return pack_block(images, start, count, block, rounded, static_cast<const double*>(nullptr));
    }
}

#include "product-inl.h"

constexpr Kernel<Real> KERNEL = {LANES, pack, panel_entry, product_entry};
