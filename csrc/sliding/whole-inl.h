// The kernel of whole images, in float64: one distance an image, and its pixels as values.

// |q - p|^2 over whole images; `padded` is a multiple of two vectors.
static double whole_distance(const double* q, const double* p, int64_t padded) {
    F even = broadcast(0), odd = broadcast(0);
    for (int64_t x = 0; x < padded; x += 2 * LANES) {
        const F a = load(q + x) - load(p + x), b = load(q + x + LANES) - load(p + x + LANES);
        even = fma(a, a, even);
        odd = fma(b, b, odd);
    }
    double each[LANES], total = 0;
    store(each, even + odd);
    for (const double one : each) total += one;
    return total;
}

static void whole(const WholeTask& t) {
    double nearest = HUGE_VAL, s = 0, s2 = 0, sl = 0;
    for (int i = 0; i < t.count; ++i) {
        t.distances[i] = whole_distance(t.q, t.p + i * t.padded, t.padded);
        nearest = t.distances[i] < nearest ? t.distances[i] : nearest;
    }
    for (int64_t x = 0; x < t.padded; x += LANES) store(t.v + x, broadcast(0));
    for (int64_t x = 0; t.v2 && x < t.padded; x += LANES) store(t.v2 + x, broadcast(0));
    for (int i = 0; i < t.count; ++i) {
        const double w = std::exp((nearest - t.distances[i]) * t.scale);
        s += w;
        s2 += w * w;
        if (!(w > 0)) continue;
        sl += w * (nearest - t.distances[i]);
        const double* p = t.p + i * t.padded;
        for (int64_t x = 0; x < t.padded; x += LANES) store(t.v + x, fma(broadcast(w), load(p + x), load(t.v + x)));
        for (int64_t x = 0; t.v2 && x < t.padded; x += LANES)
            store(t.v2 + x, fma(broadcast(w) * load(p + x), load(p + x), load(t.v2 + x)));
    }
    *t.nearest = nearest;
    *t.s = s;
    *t.s2 = s2;
    if (t.sl) *t.sl = sl;
}
