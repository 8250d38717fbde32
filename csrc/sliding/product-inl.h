// Products with the Jacobian J of the posterior mean: the second pass over the pairs, in which all weights are known.
//
// J^T u: with c = w u.(x - D) of every pair, the gradient at a pixel is the sum over displacements of its training
// pixel times the sum of c over the window around it. So c is box-summed back along the diagonals that its distance
// came from, once more by running sums: rows of c in a ring of k, their sum, and then along the columns. J t: the sum
// of w (x - D) (t.p - t.q), where t.p is a box sum along a diagonal as distances are.

// Factors of a weight: bits of distance, the least log-weight, and the one below which nothing counts.
struct Weights {
    F scale, lowest, reach;
};

PS_INLINE Weights weights_of(const Task<Real>& t) {
    return {broadcast(t.scale), broadcast(LOWEST_BITS / t.scale), broadcast(-t.negligible)};
}

// The distances of COUNT neighbouring windows, sums of `ROWS` state rows.
template <int COUNT, int ROWS>
PS_INLINE void add_rows(F (&distance)[COUNT], const Real* const (&state)[ROWS], int64_t at) {
    PS_EACH(COUNT) distance[i] = load(state[0] + at + i * LANES);
    for (int row = 1; row < ROWS; ++row) PS_EACH(COUNT) distance[i] = distance[i] + load(state[row] + at + i * LANES);
}

template <int COUNT>
PS_INLINE F least_of(const F (&distance)[COUNT]) {
    F nearest = distance[0];
    for (int i = 1; i < COUNT; ++i) nearest = minimum(nearest, distance[i]);
    return nearest;
}

// What meets the distances of one run, row after row, for J^T u.
template <int C>
class Backward {
    static constexpr int BEFORE = 4;  // columns of zeros before a query's windows, where diagonals begin
    const Task<Real>& t;
    const Product<Real>& product;
    const Panel& panel;
    const Run& run;
    const int n, k, r, queries, groups;
    const int64_t pitch, row_size;  // vectors from one query's c to the next's; numbers of a row
    int live = 0;                   // groups of c in the ring that are not zero

public:
    Backward(const Task<Real>& t, const Product<Real>& product, const Panel& panel, const Run& run)
        : t(t),
          product(product),
          panel(panel),
          run(run),
          n(C ? C : t.channels),
          k(t.patch_size),
          r(k / 2),
          queries(panel.cols.queries()),
          groups(panel.cols.locked ? 1 : (panel.entries + GROUP - 1) / GROUP),
          pitch(product_pitch(panel)),
          row_size(product_row(panel) * LANES) {
        for (int64_t at = 0; at < row_size; at += LANES) store(product.running + at, broadcast(0));
        for (int64_t at = 0; at < int64_t(k) * queries * groups; ++at) product.nothing[at] = true;
    }

    // Window row `a` has become complete for query row `i`, the run's pair of rows number `window`.
    template <int ROWS>
    void row(const Real* const (&state)[ROWS], int i, int a, int window) {
        const Axis& cols = panel.cols;
        const Real* values = t.p + (int64_t(a) * t.image_width + cols.w0) * n * LANES;
        const Weights by = weights_of(t);
        const int64_t slot = int64_t(window % k);
        for (int j = 0; j < queries; ++j) {
            const int pixel = i * t.width + cols.q0 + j;
            bool* nothing = product.nothing + (slot * queries + j) * groups;
            if (cols.locked) {
                meet<1, ROWS>(state, int64_t(j) * LANES, by, pixel, values + int64_t(j) * n * LANES,
                              slot * row_size + j * LANES, j * LANES, nothing);
                continue;
            }
            for (int group = 0; group < groups; ++group) {
                const int64_t entry = int64_t(group) * GROUP;
                const int64_t at = (j * pitch + BEFORE + entry) * LANES;
                meet<GROUP, ROWS>(state, (int64_t(j + MARGIN) * panel.pitch + entry) * LANES, by, pixel,
                                  values + entry * n * LANES, slot * row_size + at, at, nothing + group);
            }
        }
        emit(window);
    }

    // The rows below the last window, whose boxes still hold some of the run's c.
    void finish() {
        for (int window = run.length; window < run.length + 2 * r; ++window) {
            if (window >= k) {
                const int64_t slot = int64_t(window % k);
                for (int j = 0; j < queries; ++j)
                    for (int group = 0; group < groups; ++group) {
                        bool* nothing = product.nothing + (slot * queries + j) * groups + group;
                        const int64_t at =
                            panel.cols.locked ? j * LANES : (j * pitch + BEFORE + int64_t(group) * GROUP) * LANES;
                        if (panel.cols.locked)
                            drop<1>(slot * row_size + at, at, nothing);
                        else
                            drop<GROUP>(slot * row_size + at, at, nothing);
                    }
            }
            emit(window);
        }
    }

private:
    // Subtracts the ring's c of k rows ago from the running sums; its slot then counts as zero.
    template <int COUNT>
    PS_INLINE_MEMBER void drop(int64_t kept, int64_t at, bool* nothing) {
        if (*nothing) return;
        PS_EACH(COUNT)
        store(product.running + at + i * LANES,
              load(product.running + at + i * LANES) - load(product.ring + kept + i * LANES));
        *nothing = true;
        --live;
    }

    // c of COUNT windows of one query, into the ring at `kept` and the running sums at `at`.
    template <int COUNT, int ROWS>
    PS_INLINE_MEMBER void meet(const Real* const (&state)[ROWS], int64_t from, const Weights& by, int pixel,
                               const Real* values, int64_t kept, int64_t at, bool* nothing) {
        F distance[COUNT], x[COUNT], w[COUNT], c[COUNT];
        add_rows(distance, state, from);
        const F evidence = broadcast(product.evidence[pixel]);
        if (!any_above(evidence + by.reach, least_of(distance))) return drop<COUNT>(kept, at, nothing);
        PS_EACH(COUNT) x[i] = evidence - distance[i];
        exp2_scaled(w, x, by.scale, by.lowest);
        const Real* u = product.direction + int64_t(pixel) * n;
        const F mean = broadcast(-product.along_mean[pixel]);
        PS_EACH(COUNT) c[i] = mean;
        for (int channel = 0; channel < n; ++channel) {
            const F along = broadcast(u[channel]);
            PS_EACH(COUNT) c[i] = fma(along, load(values + (int64_t(i) * n + channel) * LANES), c[i]);
        }
        PS_EACH(COUNT) c[i] = w[i] * c[i];
        Real *running = product.running + at, *ring = product.ring + kept;
        if (*nothing) {
            PS_EACH(COUNT) store(running + i * LANES, load(running + i * LANES) + c[i]);
            ++live;
        } else {
            PS_EACH(COUNT)
            store(running + i * LANES, load(running + i * LANES) + (c[i] - load(ring + i * LANES)));
        }
        PS_EACH(COUNT) store(ring + i * LANES, c[i]);
        *nothing = false;
    }

    // The running sums hold rows window - k + 1 .. window: the box around the row of pixels in their middle.
    void emit(int window) {
        int row = run.query + window - r;
        const int training = run.window + window - r;
        if (t.circular) row = (row % t.height + t.height) % t.height;
        if (live == 0 || row < 0 || row >= t.height || training < 0 || training >= t.image_height) return;
        Real* into = product.lanes + int64_t(row) * t.width * (1 + n) * LANES;
        const Real* pixels = t.p + int64_t(training) * t.image_width * n * LANES;
        const Axis& cols = panel.cols;
        if (cols.locked) return emit_diagonal<1>(into, pixels, cols.q0, cols.q0, queries);
        if (wraps(cols, t.width, t.circular)) {
            int d = 0;
            for (; d + NEIGHBOURS <= t.width; d += NEIGHBOURS)
                emit_diagonal<NEIGHBOURS>(into, pixels, cols.w0 - (NEIGHBOURS - 1) - d, 1 - NEIGHBOURS,
                                          panel.entries + NEIGHBOURS - 1);
            for (; d < t.width; ++d) emit_diagonal<1>(into, pixels, cols.w0 - d, 0, panel.entries);
            return;
        }
        for (int d = cols.w0 - (cols.q1 - 1); d <= cols.w1 - 1 - cols.q0; d += NEIGHBOURS) {
            const int first = std::max(cols.q0, cols.w0 - d - (NEIGHBOURS - 1)), end = std::min(cols.q1, cols.w1 - d);
            emit_diagonal<NEIGHBOURS>(into, pixels, first, first + d - cols.w0, end - first);
        }
    }

    // `U` neighbouring diagonals: queries from column `query` on with windows from number `entry` on, `steps` of them.
    template <int U>
    void emit_diagonal(Real* into, const Real* pixels, int query, int entry, int steps) {
        const Axis& cols = panel.cols;
        const int width = t.width;
        const auto wrapped = [&](int column) PS_LAMBDA {
            return !t.circular ? column : column < 0 ? column + width : column >= width ? column - width : column;
        };
        const auto box = [&](int step) PS_LAMBDA {
            if (cols.locked) return product.running + int64_t(step) * LANES;
            return product.running + ((wrapped(query + step) - cols.q0) * pitch + BEFORE + entry + step) * LANES;
        };
        // The training column of the first pixel: windows lie inside the image, or each in its own column.
        const int column = cols.locked ? cols.q0 - r : cols.w0 + entry - r;
        F h[U];
        for (int u = 0; u < U; ++u) h[u] = broadcast(0);
        for (int step = 0; step < steps + 2 * r; ++step) {
            if (step < steps) {
                const Real* at = box(step);
                PS_EACH(U) h[i] = h[i] + load(at + i * LANES);
            }
            if (step >= k) {
                const Real* at = box(step - k);
                PS_EACH(U) h[i] = h[i] - load(at + i * LANES);
            }
            const int pixel = wrapped(query + step - r);
            if (pixel < 0 || pixel >= width) continue;
            Real* sums = into + int64_t(pixel) * (1 + n) * LANES;
            const Real* x = pixels + int64_t(column + step) * n * LANES;
            F all = h[0];
            for (int u = 1; u < U; ++u) all = all + h[u];
            store(sums, load(sums) + all);
            for (int c = 0; c < n; ++c) {
                F sum = load(sums + (1 + c) * LANES);
                for (int u = 0; u < U; ++u) sum = fma(h[u], load(x + (int64_t(u) * n + c) * LANES), sum);
                store(sums + (1 + c) * LANES, sum);
            }
        }
    }
};

// Keeps the box sums t.p of a run.
struct Keeping {
    Real* boxes;
    int64_t size;  // numbers of a state row

    template <int ROWS>
    void row(const Real* const (&state)[ROWS], int, int, int window) {
        Real* into = boxes + window * size;
        for (int64_t at = 0; at < size; at += LANES) {
            F sum[1];
            add_rows(sum, state, at);
            store(into + at, sum[0]);
        }
    }
};

// What meets the distances of one run for J t, the box sums being at hand.
template <int C>
struct Forward {
    const Task<Real>& t;
    const Product<Real>& product;
    const Panel& panel;

    template <int ROWS>
    void row(const Real* const (&state)[ROWS], int i, int a, int window) {
        const int n = C ? C : t.channels;
        const Axis& cols = panel.cols;
        const Real* values = t.p + (int64_t(a) * t.image_width + cols.w0) * n * LANES;
        const Real* boxes = product.boxes + window * panel.state_row * LANES;
        const Weights by = weights_of(t);
        for (int j = 0; j < cols.queries(); ++j) {
            const int pixel = i * t.width + cols.q0 + j;
            if (cols.locked) {
                meet<1, ROWS>(state, boxes, int64_t(j) * LANES, by, pixel, values + int64_t(j) * n * LANES, n);
                continue;
            }
            for (int entry = 0; entry < panel.entries; entry += GROUP)
                meet<GROUP, ROWS>(state, boxes, (int64_t(j + MARGIN) * panel.pitch + entry) * LANES, by, pixel,
                                  values + int64_t(entry) * n * LANES, n);
        }
    }

    template <int COUNT, int ROWS>
    PS_INLINE_MEMBER void meet(const Real* const (&state)[ROWS], const Real* boxes, int64_t from, const Weights& by,
                               int pixel, const Real* values, int n) {
        F distance[COUNT], x[COUNT], w[COUNT];
        add_rows(distance, state, from);
        const F evidence = broadcast(product.evidence[pixel]);
        if (!any_above(evidence + by.reach, least_of(distance))) return;
        PS_EACH(COUNT) x[i] = evidence - distance[i];
        exp2_scaled(w, x, by.scale, by.lowest);
        const F shift = broadcast(product.along_mean[pixel]);
        PS_EACH(COUNT) w[i] = w[i] * (load(boxes + from + i * LANES) - shift);
        Real* sums = product.lanes + (int64_t(pixel) * (1 + n) + 1) * LANES;
        for (int c = 0; c < n; ++c) {
            const F mean = broadcast(product.mean[int64_t(pixel) * n + c]);
            F sum = load(sums + c * LANES);
            PS_EACH(COUNT) sum = fma(w[i], load(values + (int64_t(i) * n + c) * LANES) - mean, sum);
            store(sums + c * LANES, sum);
        }
    }
};

template <int C>
static void product_of_channels(const Task<Real>& t, const Product<Real>& product, const Panel& panel) {
    fill_tails(t, panel);
    for (const Run& run : panel.runs) {
        if (product.transposed) {
            Backward<C> backward(t, product, panel, run);
            if (!slide_run<C, SQUARES>(t, panel, run, backward)) return;
            backward.finish();
        } else {
            Task<Real> of_direction = t;
            of_direction.q = product.padded_direction;
            fill_tails(t, panel, 0);
            Keeping keeping = {product.boxes, panel.state_row * LANES};
            if (!slide_run<C, PRODUCTS>(of_direction, panel, run, keeping)) return;
            fill_tails(t, panel);
            Forward<C> forward = {t, product, panel};
            if (!slide_run<C, SQUARES>(t, panel, run, forward)) return;
        }
    }
}

static void product_entry(const Task<Real>& t, const Product<Real>& product, const Panel& panel) {
    if (!EXACT && t.channels == 1) return product_of_channels<EXACT ? 0 : 1>(t, product, panel);
    if (!EXACT && t.channels == 3) return product_of_channels<EXACT ? 0 : 3>(t, product, panel);
    return product_of_channels<0>(t, product, panel);
}
