// The sliding kernel, compiled once per instruction set: included inside namespace PS_SIMD, which brings vectors F.
//
// A squared window distance is a sum over k columns and k rows of squared pixel differences. Along a diagonal both sums
// slide: a window of k steps is a suffix of one block of k steps plus a prefix of the next (van Herk), so any k costs
// three additions an axis. Nothing is ever subtracted, so a small distance carries no rounding left by large ones.

// Along one diagonal: squared differences e of `U` neighbouring displacements at one training column.
template <int C, int U>
PS_INLINE void add_squares(F (&e)[U], const float* q, const float* p, int channels) {
    const int n = C ? C : channels;
    for (int c = 0; c < n; ++c) {
        const F pixel = load(p + c * LANES);
        for (int u = 0; u < U; ++u) {
            const F difference = pixel - broadcast(q[c - u * n]);
            e[u] = fma(difference, difference, e[u]);
        }
    }
}

template <int C, int U>
PS_INLINE void squares(F (&e)[U], const float* q, const float* p, int channels) {
    const int n = C ? C : channels;
    const F pixel = load(p);
    for (int u = 0; u < U; ++u) {
        const F difference = pixel - broadcast(q[-u * n]);
        e[u] = difference * difference;
    }
    for (int c = 1; c < n; ++c) {
        const F pixel = load(p + c * LANES);
        for (int u = 0; u < U; ++u) {
            const F difference = pixel - broadcast(q[c - u * n]);
            e[u] = fma(difference, difference, e[u]);
        }
    }
}

// What a row of horizontal window sums h does to the vertical sums.
enum Into {
    SET,          // to = h
    ADD,          // to = from + h
    SET_KEEP,     // to = keep = h
    ADD_KEEP,     // to = from + h, keep = h
};

struct Rows {
    float* to;
    const float* from;
    float* keep;
};

template <Into INTO>
PS_INLINE void put(const Rows& rows, int64_t at, F h) {
    if (INTO == SET_KEEP || INTO == ADD_KEEP) store(rows.keep + at, h);
    if (INTO == ADD || INTO == ADD_KEEP) h = load(rows.from + at) + h;
    store(rows.to + at, h);
}

// The horizontal window sums of one pair of rows (query row q, training row p) on `U` neighbouring diagonals.
// K = 1, 3 keep the few partial sums in registers; K = 0 takes any k by blocks.
template <int C, int K, int U, Into INTO>
PS_INLINE void slide(const Task& t, const Panel& panel, const Diagonals& d, const float* q, const float* p,
                     const Rows& rows) {
    const int n = C ? C : t.channels;
    const int k = K ? K : t.patch_size, r = k / 2;
    const int windows = d.last - d.first;
    // Step x is training column first - r + x; the window that ends there is number x - k + 1.
    q += int64_t(d.first - r - d.displacement) * n;
    p += int64_t(d.first - r) * n * LANES;
    const int32_t* state_of = panel.state_of.data() + (d.first - d.displacement - panel.lowest);
    const int column = d.first - panel.cols.w0;
    auto emit = [&](int window, const F(&h)[U]) PS_LAMBDA {
        for (int u = 0; u < U; ++u) put<INTO>(rows, int64_t(state_of[window - u] + column + window) * LANES, h[u]);
    };

    if (K == 1) {
        for (int x = 0; x < windows; ++x) {
            F e[U];
            squares<C, U>(e, q + x * n, p + int64_t(x) * n * LANES, n);
            emit(x, e);
        }
        return;
    }
    if (K == 3 || K == 5) {
        // sums[i]: the last i + 1 squares.
        constexpr int HELD = K > 1 ? K - 1 : 1;
        F sums[HELD][U];
        for (int i = 0; i < HELD; ++i)
            for (int u = 0; u < U; ++u) sums[i][u] = broadcast(0.f);
        for (int x = 0; x < windows + K - 1; ++x) {
            F e[U], h[U];
            squares<C, U>(e, q + x * n, p + int64_t(x) * n * LANES, n);
            for (int u = 0; u < U; ++u) {
                h[u] = sums[HELD - 1][u] + e[u];
                for (int i = HELD - 1; i > 0; --i) sums[i][u] = sums[i - 1][u] + e[u];
                sums[0][u] = e[u];
            }
            if (x >= K - 1) emit(x - K + 1, h);
        }
        return;
    }

    float* const suffix = t.scratch;  // [k + 1][U][LANES]; entry k stays zero
    F h[U];
    for (int u = 0; u < U; ++u) h[u] = broadcast(0.f);
    for (int u = 0; u < U; ++u) store(suffix + (k * U + u) * LANES, h[u]);
    // First block, backwards: suffix sums only.
    for (int x = k - 1; x >= 0; --x) {
        add_squares<C, U>(h, q + x * n, p + int64_t(x) * n * LANES, n);
        if (x < windows)
            for (int u = 0; u < U; ++u) store(suffix + (x * U + u) * LANES, h[u]);
    }
    emit(0, h);
    // Every further block, forwards: window = suffix of the block before + prefix of this one.
    for (int start = k; start < windows + k - 1; start += k) {
        F prefix[U];
        for (int u = 0; u < U; ++u) prefix[u] = broadcast(0.f);
        const int end = start + k < windows + k - 1 ? start + k : windows + k - 1;
        if (start >= windows) {
            for (int x = start; x < end; ++x) {
                add_squares<C, U>(prefix, q + x * n, p + int64_t(x) * n * LANES, n);
                for (int u = 0; u < U; ++u) h[u] = prefix[u] + load(suffix + ((x - start + 1) * U + u) * LANES);
                emit(x - k + 1, h);
            }
            break;
        }
        // Windows start in this block too: keep its squares where the suffixes already used stood.
        for (int x = start; x < end; ++x) {
            F e[U];
            squares<C, U>(e, q + x * n, p + int64_t(x) * n * LANES, n);
            for (int u = 0; u < U; ++u) {
                prefix[u] = prefix[u] + e[u];
                h[u] = prefix[u] + load(suffix + ((x - start + 1) * U + u) * LANES);
                store(suffix + ((x - start) * U + u) * LANES, e[u]);
            }
            emit(x - k + 1, h);
        }
        for (int u = 0; u < U; ++u) h[u] = broadcast(0.f);
        for (int x = k - 1; x > 0; --x)
            for (int u = 0; u < U; ++u) {
                h[u] = h[u] + load(suffix + (x * U + u) * LANES);
                store(suffix + (x * U + u) * LANES, h[u]);
            }
    }
}

// The same where every query column meets its own column only: one diagonal, continued by zeros on both sides.
template <int C, Into INTO>
PS_INLINE void slide_locked(const Task& t, const Panel& panel, const float* q, const float* p, const Rows& rows) {
    const int n = C ? C : t.channels;
    const int k = t.patch_size, r = k / 2, windows = panel.cols.queries(), steps = windows + k - 1;
    const int first = panel.cols.q0 - r;
    float* const squared = t.scratch;
    float* const suffix = squared + int64_t(steps) * LANES;
    for (int x = 0; x < steps; ++x) {
        F e[1] = {broadcast(0.f)};
        const int column = first + x;
        if (column >= 0 && column < t.width) squares<C, 1>(e, q + column * n, p + int64_t(column) * n * LANES, n);
        store(squared + int64_t(x) * LANES, e[0]);
    }
    for (int start = 0; start < windows; start += k) {
        F sum = broadcast(0.f);
        for (int x = start + k - 1; x >= start; --x) {
            sum = sum + load(squared + int64_t(x) * LANES);
            store(suffix + int64_t(x) * LANES, sum);
        }
        put<INTO>(rows, int64_t(start) * LANES, sum);
        F prefix = broadcast(0.f);
        for (int window = start + 1; window < start + k && window < windows; ++window) {
            prefix = prefix + load(squared + int64_t(window + k - 1) * LANES);
            put<INTO>(rows, int64_t(window) * LANES, load(suffix + int64_t(window) * LANES) + prefix);
        }
    }
}

template <int C, int K, Into INTO>
static void slide_row(const Task& t, const Panel& panel, int query_row, int window_row, const Rows& rows) {
    const int n = C ? C : t.channels;
    // Rows outside: the noisy image wraps or is zero; a training row is only asked for outside where both are zero.
    if (t.circular) query_row = (query_row % t.height + t.height) % t.height;
    const bool q_inside = query_row >= 0 && query_row < t.height, p_inside = window_row >= 0 && window_row < t.height;
    const float* q = t.q + int64_t(q_inside ? query_row : t.height) * t.q_pitch + t.q_margin * n;
    const float* p = t.p + int64_t(p_inside ? window_row : t.height) * t.width * n * LANES;
    if (panel.cols.locked) {
        slide_locked<C, INTO>(t, panel, q, p, rows);
        return;
    }
    for (const Diagonals& d : panel.diagonals) {
        if (d.count == NEIGHBOURS)
            slide<C, K, NEIGHBOURS, INTO>(t, panel, d, q, p, rows);
        else
            slide<C, K, 1, INTO>(t, panel, d, q, p, rows);
    }
}

// One query against the windows of one training row: distances are sums of `ROWS` state rows.
// Weights are taken relative to the query's reference. Returns false, having changed nothing, where a window is so much
// nearer than the reference that it must be lowered first.
template <int C, int ROWS>
PS_INLINE bool add_query(const Task& t, const float* const (&rows)[ROWS], int groups, const float* values, float* lanes,
                         float reference) {
    const int n = C ? C : t.channels;
    const F ref = broadcast(reference), scale = broadcast(t.scale);
    const F negligible = broadcast(t.negligible), lowest = broadcast(-100.f / t.scale);
    F nearest = broadcast(-FAR);
    F s = load(lanes), s2 = load(lanes + LANES), v[C ? C : 1];
    for (int c = 0; c < C; ++c) v[c] = load(lanes + (2 + c) * LANES);
    if (C == 0) {
        for (int i = 0; i < groups * GROUP; ++i) {
            F distance = load(rows[0] + i * LANES);
            for (int row = 1; row < ROWS; ++row) distance = distance + load(rows[row] + i * LANES);
            nearest = maximum(nearest, ref - distance);
        }
        if (any_above(nearest, broadcast(RISE_BITS / t.scale))) return false;
    }
    for (int g = 0; g < groups; ++g) {
        F x[GROUP], w[GROUP];
        PS_UNROLL
        for (int i = 0; i < GROUP; ++i) {
            const int64_t at = (g * GROUP + i) * LANES;
            F distance = load(rows[0] + at);
            for (int row = 1; row < ROWS; ++row) distance = distance + load(rows[row] + at);
            x[i] = ref - distance;
        }
        const F top = maximum(maximum(x[0], x[1]), maximum(x[2], x[3]));
        nearest = maximum(nearest, top);
        if (!any_above(top, negligible)) continue;
        PS_UNROLL
        for (int i = 0; i < GROUP; ++i) w[i] = exp2_scaled(x[i], scale, lowest);
        s = s + ((w[0] + w[1]) + (w[2] + w[3]));
        PS_UNROLL
        for (int i = 0; i < GROUP; ++i) {
            s2 = fma(w[i], w[i], s2);
            const float* value = values + int64_t(g * GROUP + i) * n * LANES;
            for (int c = 0; c < C; ++c) v[c] = fma(w[i], load(value + c * LANES), v[c]);
            if (C == 0)
                for (int c = 0; c < n; ++c)
                    store(lanes + (2 + c) * LANES, fma(w[i], load(value + c * LANES), load(lanes + (2 + c) * LANES)));
        }
    }
    if (C && any_above(nearest, broadcast(RISE_BITS / t.scale))) return false;
    store(lanes, s);
    store(lanes + LANES, s2);
    for (int c = 0; c < C; ++c) store(lanes + (2 + c) * LANES, v[c]);
    return true;
}

template <int C>
PS_INLINE bool add_locked_query(const Task& t, F distance, const float* value, float* lanes, float reference) {
    const int n = C ? C : t.channels;
    const F x = broadcast(reference) - distance;
    if (any_above(x, broadcast(RISE_BITS / t.scale))) return false;
    if (!any_above(x, broadcast(t.negligible))) return true;
    const F w = exp2_scaled(x, broadcast(t.scale), broadcast(-100.f / t.scale));
    store(lanes, load(lanes) + w);
    store(lanes + LANES, fma(w, w, load(lanes + LANES)));
    for (int c = 0; c < n; ++c)
        store(lanes + (2 + c) * LANES, fma(w, load(value + c * LANES), load(lanes + (2 + c) * LANES)));
    return true;
}

// Makes the nearest of these windows the reference and rescales the query's sums to it.
template <int ROWS>
PS_COLD void lower_reference(const Task& t, const float* const (&rows)[ROWS], int entries, float* lanes, int pixel) {
    float nearest = FAR;
    for (int i = 0; i < entries; ++i) {
        F distance = load(rows[0] + i * LANES);
        for (int row = 1; row < ROWS; ++row) distance = distance + load(rows[row] + i * LANES);
        alignas(64) float each[LANES];
        store(each, distance);
        for (float one : each) nearest = one < nearest ? one : nearest;
    }
    const double bits = (double(nearest) - double(t.reference[pixel])) * double(t.scale);
    const double factor = exp2(bits);
    double* sums = t.sums + int64_t(pixel) * (2 + t.channels);
    for (int part = 0; part < 2 + t.channels; ++part) {
        const double by = part == 1 ? factor * factor : factor;
        sums[part] *= by;
        store(lanes + part * LANES, load(lanes + part * LANES) * broadcast(float(by)));
    }
    t.reference[pixel] = nearest;
}

// Window row `a` has become complete for query row `i`: adds its pairs to the sums of that row's queries.
template <int C, int ROWS>
static void evaluate(const Task& t, const Panel& panel, const float* const (&state)[ROWS], int i, int a) {
    const int n = C ? C : t.channels;
    const Axis& cols = panel.cols;
    const int queries = cols.queries(), groups = (panel.entries + GROUP - 1) / GROUP;
    float* lanes = t.lanes + (panel.first_query + int64_t(i - panel.rows.q0) * queries) * (2 + n) * LANES;
    const float* values = t.p + (int64_t(a) * t.width + cols.w0) * n * LANES;
    for (int j = 0; j < queries; ++j, lanes += (2 + n) * LANES) {
        const int pixel = i * t.width + cols.q0 + j;
        const float* rows[ROWS];
        const int64_t at = cols.locked ? j : int64_t(j + MARGIN) * panel.pitch;
        for (int row = 0; row < ROWS; ++row) rows[row] = state[row] + at * LANES;
        if (cols.locked) {
            F distance = load(rows[0]);
            for (int row = 1; row < ROWS; ++row) distance = distance + load(rows[row]);
            const float* value = values + int64_t(j) * n * LANES;
            while (!add_locked_query<C>(t, distance, value, lanes, t.reference[pixel]))
                lower_reference<ROWS>(t, rows, 1, lanes, pixel);
        } else {
            while (!add_query<C, ROWS>(t, rows, groups, values, lanes, t.reference[pixel]))
                lower_reference<ROWS>(t, rows, panel.entries, lanes, pixel);
        }
    }
}

// Adds the lanes of every query of the panel to its float64 sums.
static void flush(const Task& t, const Panel& panel) {
    const int parts = 2 + t.channels, queries = panel.cols.queries();
    float* lanes = t.lanes + panel.first_query * parts * LANES;
    for (int i = panel.rows.q0; i < panel.rows.q1; ++i)
        for (int j = 0; j < queries; ++j) {
            double* sums = t.sums + (int64_t(i) * t.width + panel.cols.q0 + j) * parts;
            for (int part = 0; part < parts; ++part, lanes += LANES) {
                float total[LANES];
                for (int l = 0; l < LANES; ++l) total[l] = lanes[l];
                for (int half = LANES / 2; half > 0; half /= 2)
                    for (int l = 0; l < half; ++l) total[l] += total[l + half];
                sums[part] += double(total[0]);
                store(lanes, broadcast(0.f));
            }
        }
}

// Pairs beyond the last window of a query read FAR and weigh nothing.
static void fill_tails(const Task& t, const Panel& panel) {
    if (panel.cols.locked) return;
    for (int64_t row = 0; row < (1 + panel.slots) * (panel.state_row / panel.pitch); ++row)
        for (int i = panel.entries; i < panel.pitch; ++i)
            store(t.state + (row * panel.pitch + i) * LANES, broadcast(FAR));
}

// One run of rows: window sums of k rows slide along it as those of columns do, with whole state rows as elements.
template <int C, int K>
static bool walk(const Task& t, const Panel& panel, const Run& run) {
    const int k = K ? K : t.patch_size, r = k / 2, windows = run.length, steps = windows + k - 1;
    const int64_t size = panel.state_row * LANES;
    float* const prefix = t.state;
    auto slot = [&](int i) PS_LAMBDA { return t.state + (1 + i) * size; };
    auto query = [&](int window) PS_LAMBDA { return (run.query + window) % t.height; };
    auto stop = [&]() PS_LAMBDA { return t.interrupt->stopped(t.calling_thread); };

    if (K) {  // few rows: add them afresh
        constexpr int ROWS = K ? K : 1;
        for (int x = 0; x < steps; ++x) {
            if (stop()) return false;
            slide_row<C, K, SET>(t, panel, run.query - r + x, run.window - r + x, {slot(x % ROWS), nullptr, nullptr});
            const int window = x - ROWS + 1;
            if (window < 0) continue;
            const float* rows[ROWS];
            for (int row = 0; row < ROWS; ++row) rows[row] = slot((window + row) % ROWS);
            evaluate<C, ROWS>(t, panel, rows, query(window), run.window + window);
        }
        return true;
    }

    // First block, backwards: suffix sums only; rows past the last window gather in its slot.
    const int last = (windows < k ? windows : k) - 1;
    for (int x = k - 1; x >= 0; --x) {
        if (stop()) return false;
        const int y = run.query - r + x, a = run.window - r + x;
        if (x == k - 1)
            slide_row<C, K, SET>(t, panel, y, a, {slot(last), nullptr, nullptr});
        else
            slide_row<C, K, ADD>(t, panel, y, a, {slot(x < last ? x : last), slot(x < last ? x + 1 : last), nullptr});
    }
    const float* first_row[1] = {slot(0)};
    evaluate<C, 1>(t, panel, first_row, query(0), run.window);
    // Further blocks, forwards.
    for (int start = k; start < steps; start += k) {
        const bool keep = start < windows;
        for (int x = start; x < start + k && x < steps; ++x) {
            if (stop()) return false;
            const int y = run.query - r + x, a = run.window - r + x;
            const Rows rows = {prefix, prefix, keep ? slot(x - start) : nullptr};
            if (x == start && keep)
                slide_row<C, K, SET_KEEP>(t, panel, y, a, rows);
            else if (x == start)
                slide_row<C, K, SET>(t, panel, y, a, rows);
            else if (keep)
                slide_row<C, K, ADD_KEEP>(t, panel, y, a, rows);
            else
                slide_row<C, K, ADD>(t, panel, y, a, rows);
            const int window = x - k + 1;
            if (x == start + k - 1) {
                const float* rows1[1] = {prefix};
                evaluate<C, 1>(t, panel, rows1, query(window), run.window + window);
            } else {
                const float* rows2[2] = {prefix, slot(x - start + 1)};
                evaluate<C, 2>(t, panel, rows2, query(window), run.window + window);
            }
        }
        if (!keep) break;
        for (int x = k - 2; x > 0; --x) {
            float *to = slot(x), *from = slot(x + 1);
            for (int64_t i = 0; i < size; i += LANES) store(to + i, load(to + i) + load(from + i));
        }
    }
    return true;
}

template <int C, int K>
static void walk_panel(const Task& t, const Panel& panel) {
    fill_tails(t, panel);
    int pairs = 0;
    for (const Run& run : panel.runs) {
        if (!walk<C, K>(t, panel, run)) return;
        pairs += panel.entries;
        if (pairs >= PAIRS_A_FLUSH) {
            flush(t, panel);
            pairs = 0;
        }
    }
    if (t.flush_at_end) flush(t, panel);
}

template <int C>
static void panel_of_channels(const Task& t, const Panel& panel) {
    if (t.patch_size == 1)
        walk_panel<C, 1>(t, panel);
    else if (t.patch_size == 3)
        walk_panel<C, 3>(t, panel);
    else
        walk_panel<C, 0>(t, panel);
}

static void panel_entry(const Task& t, const Panel& panel) {
    switch (t.channels) {
        case 1: return panel_of_channels<1>(t, panel);
        case 3: return panel_of_channels<3>(t, panel);
        case 4: return panel_of_channels<4>(t, panel);
        default: return panel_of_channels<0>(t, panel);
    }
}

// Transposes images to [row][column][channel][lane], a few pixels at a time so that both sides stay in the L1 cache.
template <typename Value, typename Raw>
static void pack_block(const Images& images, int64_t start, int count, float* block, const Value& value, const Raw*) {
    const int n = images.channels;
    const int64_t pixels = int64_t(images.height) * images.width;
    constexpr int TILE = 16;
    for (int64_t tile = 0; tile < pixels; tile += TILE) {
        const int64_t end = tile + TILE < pixels ? tile + TILE : pixels;
        for (int l = 0; l < LANES; ++l) {
            const Raw* image = static_cast<const Raw*>(images.data);
            if (l < count) image += images.index(start + l) * n * pixels;
            for (int c = 0; c < n; ++c)
                for (int64_t x = tile; x < end; ++x)
                    block[(x * n + c) * LANES + l] = l < count ? value(image[c * pixels + x]) : ABSENT_PIXEL;
        }
    }
}

struct ByteValue {
    const float* table;
    float operator()(uint8_t raw) const { return table[raw]; }
};

struct FloatValue {
    float operator()(float raw) const { return raw; }
};

static void pack_entry(const Images& images, int64_t start, int count, float* block) {
    if (images.bytes)
        pack_block(images, start, count, block, ByteValue{images.value_of_byte}, static_cast<const uint8_t*>(nullptr));
    else
        pack_block(images, start, count, block, FloatValue{}, static_cast<const float*>(nullptr));
}

// |q - p|^2 over whole images: float32 squares, added up in float64 every few hundred of them.
static double whole_distance(const float* q, const float* p, int64_t padded) {
    double total = 0;
    for (int64_t start = 0; start < padded; start += 32 * LANES) {
        const int64_t end = start + 32 * LANES < padded ? start + 32 * LANES : padded;
        F even = broadcast(0.f), odd = broadcast(0.f);
        for (int64_t x = start; x < end; x += 2 * LANES) {
            const F a = load(q + x) - load(p + x), b = load(q + x + LANES) - load(p + x + LANES);
            even = fma(a, a, even);
            odd = fma(b, b, odd);
        }
        alignas(64) float each[LANES];
        store(each, even + odd);
        for (float one : each) total += double(one);
    }
    return total;
}

static void whole_entry(const WholeTask& t) {
    double m = -HUGE_VAL, s = 0, s2 = 0;
    for (int i = 0; i < t.count; ++i) {
        t.logits[i] = -whole_distance(t.q, t.p + i * t.padded, t.padded) * t.scale;
        m = t.logits[i] > m ? t.logits[i] : m;
    }
    for (int i = 0; i < t.count; ++i) {
        const double w = exp(t.logits[i] - m);
        t.weights[i] = float(w);
        s += w;
        s2 += w * w;
    }
    for (int64_t x = 0; x < t.padded; x += LANES) {
        F sum = broadcast(0.f);
        for (int i = 0; i < t.count; ++i)
            if (t.weights[i] > 0.f) sum = fma(broadcast(t.weights[i]), load(t.p + i * t.padded + x), sum);
        alignas(64) float each[LANES];
        store(each, sum);
        for (int l = 0; l < LANES && x + l < t.pixels; ++l) t.v[x + l] = double(each[l]);
    }
    *t.m = m;
    *t.s = s;
    *t.s2 = s2;
}
