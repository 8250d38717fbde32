// The arithmetic of engine `pruned`, compiled once for each instruction set: expected weights of SIBLINGS strata, and
// the sums over the windows of one cell. Included by pruned.cpp through common/each-level-inl.h.
//
// Windows of bytes are compared by dot products in integers, windows of floats by the squares of their differences;
// what differs between the two are overloads on the type of a tile. The rest is written once, for both.

#define PS_LANES 8
#include "../common/vector-inl.h"
static_assert(LANES == TILE, "a vector holds a number of each window of a tile");

// 2^x; 0 below -126 and of NaN.
PS_INLINE F weight_at(F x) { return x >= -126.0f ? exp2(x) : F{}; }

// log2 E[w] and log2 E[w^2] of SIBLINGS strata at a query: out[2][SIBLINGS].
static void moments(const float* table, int rank, const float* features, float rest, float* out) {
    constexpr int VECTORS = SIBLINGS / LANES;
    for (int t = 0; t < 2; ++t, table += int64_t(2 * rank + 2) * SIBLINGS, out += SIBLINGS) {
        F sum[VECTORS];
        PS_EACH(VECTORS)
        sum[i] =
            load(table + (2 * rank + 1) * SIBLINGS + i * LANES) + load(table + 2 * rank * SIBLINGS + i * LANES) * rest;
        for (int j = 0; j < rank; ++j) {
            const float *quadratic = table + j * SIBLINGS, *linear = table + (rank + j) * SIBLINGS;
            const float f = features[j];
            PS_EACH(VECTORS) sum[i] += (load(quadratic + i * LANES) * f + load(linear + i * LANES)) * f;
        }
        PS_EACH(VECTORS) store(out + i * LANES, sum[i]);
    }
}

// Of n strata: E and the size measures g1 = N sd(w), g2 = N sqrt(var(w) + TILE E[w]^2), relative to 2^ref.
static void measures(const float* first, const float* second, const float* windows, const float* competing, int64_t n,
                     float ref, float* expected, float* g1, float* g2) {
    for (int64_t i = 0; i < n; i += LANES) {
        const F size = load(windows + i), share = load(competing + i) / maximum(size, broadcast(1));
        // The order of arguments keeps a NaN, whose weight is 0.
        const F e = weight_at(minimum(broadcast(60), load(first + i) - ref)) * share;
        F e2 = weight_at(minimum(broadcast(120), load(second + i) - 2 * ref)) * share;
        e2 = minimum(e2, size * e * e);  // of N numbers that are not negative, the squares add up to at most the square
        const F variance = maximum(e2 - e * e, 1e-6f * e2), about_zero = variance + float(TILE) * e * e;
        F a, b;
        for (int l = 0; l < LANES; ++l) a[l] = __builtin_sqrtf(variance[l]), b[l] = __builtin_sqrtf(about_zero[l]);
        store(expected + i, e);
        store(g1 + i, size * a);
        store(g2 + i, size * b);
    }
}

// Expected number of windows at a scale: sum of min(N, max(scale g1, min(scale g2, TILE))).
static double windows_at(const float* windows, const float* g1, const float* g2, int64_t n, float scale) {
    double total = 0;
    for (int64_t i = 0; i < n;) {
        F sum{};
        for (const int64_t end = n < i + 4096 ? n : i + 4096; i < end; i += LANES) {
            const F sampled = minimum(scale * load(g2 + i), broadcast(TILE));
            sum += minimum(load(windows + i), maximum(scale * load(g1 + i), sampled));
        }
        for (int l = 0; l < LANES; ++l) total += sum[l];
    }
    return total;
}

template <typename Pixel>
struct VectorOf;
template <>
struct VectorOf<uint8_t> {
    typedef I Scores;
};
template <>
struct VectorOf<float> {
    typedef F Scores;
};

// What is known of a tile's windows besides their pixels.
template <typename Pixel, int MOST>
struct TileFacts {
    typename VectorOf<Pixel>::Scores norm;  // of bytes, |p|^2
    I present;                              // -1 where the lane holds a window that competes
    const int64_t* ids;
    F value[MOST];
};

PS_INLINE I norm_of(const int8_t* tile, int pairs) {
    I norm{};
#if PS_LEVEL >= 256
    __m256i sum = _mm256_setzero_si256();
    for (int d = 0; d < pairs; ++d) {
        const __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(tile + d * 2 * TILE)));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, a));
    }
    norm = (I)sum;
#else
    for (int d = 0; d < pairs; ++d)
        for (int l = 0; l < TILE; ++l) {
            const int a = tile[(d * TILE + l) * 2], b = tile[(d * TILE + l) * 2 + 1];
            norm[l] += a * a + b * b;
        }
#endif
    return norm;
}

PS_INLINE F norm_of(const float*, int) { return F{}; }

// The values of pixel number `at` of a tile's windows.
PS_INLINE F values_at(const int8_t* tile, int at) {
    F x{};
#if PS_LEVEL >= 256
    const __m128i pairs = _mm_loadu_si128((const __m128i*)(tile + at / 2 * 2 * TILE));
    const __m128i bytes = _mm_srai_epi16(at % 2 ? pairs : _mm_slli_epi16(pairs, 8), 8);
    x = (F)_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(bytes));
#else
    for (int l = 0; l < TILE; ++l) x[l] = tile[(at / 2 * TILE + l) * 2 + at % 2];
#endif
    return (x + 0.5f) / 127.5f;
}

PS_INLINE F values_at(const float* tile, int at) {
    const F x = load(tile + at * TILE);
    return x - x == 0.0f ? x : F{};  // a damaged file may hold anything
}

template <typename Pixel, int MOST>
static void facts_of(const StoredOf<Pixel>* tile, const Request& request, const int64_t* ids, int count,
                     TileFacts<Pixel, MOST>& facts) {
    const Images& images = request.images;
    facts.norm = norm_of(tile, images.pairs()), facts.ids = ids;
    const int64_t per_image = int64_t(images.rows()) * images.cols();
    for (int l = 0; l < TILE; ++l)
        facts.present[l] = l < count && (!request.allowed || request.allowed[ids[l] / per_image]) ? -1 : 0;
    const int area = images.patch_size * images.patch_size;
    for (int c = 0; c < images.channels; ++c) facts.value[c] = values_at(tile, c * area + area / 2);
}

// The pixels of a window, row by row.
template <int SIDE, typename Pixel>
PS_INLINE void copy_window_of(const Images& images, int64_t id, Pixel* to) {
    const int side = SIDE > 0 ? SIDE : images.patch_size;
    const int64_t cols = images.cols(), per_image = images.rows() * cols, plane = int64_t(images.height) * images.width;
    const int64_t image = id / per_image, at = id % per_image;
    const Pixel* from = static_cast<const Pixel*>(images.pixels) + image * images.channels * plane +
                        at / cols * images.width + at % cols;
    for (int c = 0; c < images.channels; ++c, from += plane)
        for (int y = 0; y < side; ++y, to += side)
            __builtin_memcpy(to, from + y * images.width, size_t(side) * sizeof(Pixel));
}

template <typename Pixel>
PS_INLINE void copy_window(const Images& images, int64_t id, Pixel* to) {
    switch (images.patch_size) {
        case 3:
            return copy_window_of<3>(images, id, to);
        case 5:
            return copy_window_of<5>(images, id, to);
        case 7:
            return copy_window_of<7>(images, id, to);
        case 9:
            return copy_window_of<9>(images, id, to);
        case 11:
            return copy_window_of<11>(images, id, to);
        case 13:
            return copy_window_of<13>(images, id, to);
        case 15:
            return copy_window_of<15>(images, id, to);
        case 17:
            return copy_window_of<17>(images, id, to);
        default:
            return copy_window_of<0>(images, id, to);
    }
}

// Eight windows, a row each, as a tile [pairs][TILE][2] of bytes less 128.
PS_INLINE void transpose(const uint8_t* rows, int pairs, int8_t* out) {
    const int stride = 2 * pairs;
    int d = 0;
#if PS_LEVEL >= 256
    const __m128i middle = _mm_set1_epi8(int8_t(0x80));
    for (; d + TILE <= pairs; d += TILE) {  // TILE x TILE pairs
        __m128i x[TILE], y[TILE];
        for (int l = 0; l < TILE; ++l) x[l] = _mm_loadu_si128((const __m128i*)(rows + l * stride + 2 * d));
        for (int l = 0; l < TILE / 2; ++l) {
            y[2 * l] = _mm_unpacklo_epi16(x[l], x[l + 4]), y[2 * l + 1] = _mm_unpackhi_epi16(x[l], x[l + 4]);
        }
        for (int l = 0; l < TILE / 2; ++l) {
            x[2 * l] = _mm_unpacklo_epi16(y[l], y[l + 4]), x[2 * l + 1] = _mm_unpackhi_epi16(y[l], y[l + 4]);
        }
        for (int l = 0; l < TILE / 2; ++l) {
            y[2 * l] = _mm_unpacklo_epi16(x[l], x[l + 4]), y[2 * l + 1] = _mm_unpackhi_epi16(x[l], x[l + 4]);
        }
        for (int l = 0; l < TILE; ++l)
            _mm_storeu_si128((__m128i*)(out + (d + l) * 2 * TILE), _mm_xor_si128(y[l], middle));
    }
#endif
    for (; d < pairs; ++d)
        for (int l = 0; l < TILE; ++l)
            for (int i = 0; i < 2; ++i) out[(d * TILE + l) * 2 + i] = int8_t(rows[l * stride + 2 * d + i] ^ 0x80);
}

// The same of floats, as a tile [2 pairs][TILE].
PS_INLINE void transpose(const float* rows, int pairs, float* out) {
    const int stride = 2 * pairs;
    int d = 0;
#if PS_LEVEL >= 256
    for (; d + TILE <= stride; d += TILE) {  // TILE x TILE values: by ones, by twos, by fours
        __m256 x[TILE], y[TILE];
        for (int l = 0; l < TILE; ++l) x[l] = _mm256_loadu_ps(rows + l * stride + d);
        for (int l = 0; l < TILE; l += 2) {
            y[l] = _mm256_unpacklo_ps(x[l], x[l + 1]), y[l + 1] = _mm256_unpackhi_ps(x[l], x[l + 1]);
        }
        for (int l = 0; l < TILE; l += 4)
            for (int h = 0; h < 2; ++h) {
                x[l + 2 * h] = _mm256_shuffle_ps(y[l + h], y[l + h + 2], 0x44);
                x[l + 2 * h + 1] = _mm256_shuffle_ps(y[l + h], y[l + h + 2], 0xEE);
            }
        for (int l = 0; l < TILE / 2; ++l) {
            _mm256_storeu_ps(out + (d + l) * TILE, _mm256_permute2f128_ps(x[l], x[l + 4], 0x20));
            _mm256_storeu_ps(out + (d + l + 4) * TILE, _mm256_permute2f128_ps(x[l], x[l + 4], 0x31));
        }
    }
#endif
    for (; d < stride; ++d)
        for (int l = 0; l < TILE; ++l) out[d * TILE + l] = rows[l * stride + d];
}

// Gathers up to TILE windows from their images into a tile. `rows` has room for as many pixels as a tile.
template <typename Pixel>
static void pack(const Images& images, const int64_t* ids, int count, Pixel* rows, StoredOf<Pixel>* out) {
    const int pairs = images.pairs(), values = images.values(), stride = 2 * pairs;
    for (int l = 0; l < TILE; ++l) {
        Pixel* to = rows + l * stride;
        to[stride - 1] = Held<Pixel>::NOTHING;  // where the number of values is odd
        if (l >= count)
            std::fill(to, to + values, Held<Pixel>::NOTHING);
        else
            copy_window(images, ids[l], to);
    }
    transpose(rows, pairs, out);
}

// Dot products of QUERIES queries with TILES tiles of windows.
// Not inlined: what the caller holds would push the sums out of the registers.
template <int QUERIES, int TILES>
__attribute__((noinline)) static void meet(const int8_t* const* tiles, int pairs, const int16_t* const* windows,
                                           I (*out)[4]) {
#if PS_LEVEL >= 256
    __m256i acc[TILES][QUERIES];
    for (int t = 0; t < TILES; ++t)
        for (int q = 0; q < QUERIES; ++q) acc[t][q] = _mm256_setzero_si256();
    for (int d = 0; d < pairs; ++d) {
        __m256i window[TILES];
        for (int t = 0; t < TILES; ++t)
            window[t] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(tiles[t] + d * 2 * TILE)));
        for (int q = 0; q < QUERIES; ++q) {
            int32_t pair;
            __builtin_memcpy(&pair, windows[q] + 2 * d, 4);
            const __m256i x = _mm256_set1_epi32(pair);
            for (int t = 0; t < TILES; ++t) acc[t][q] = _mm256_add_epi32(acc[t][q], _mm256_madd_epi16(window[t], x));
        }
    }
    for (int t = 0; t < TILES; ++t)
        for (int q = 0; q < QUERIES; ++q) out[t][q] = (I)acc[t][q];
#else
    for (int t = 0; t < TILES; ++t)
        for (int q = 0; q < QUERIES; ++q) {
            I sum{};
            for (int d = 0; d < pairs; ++d)
                for (int l = 0; l < TILE; ++l)
                    sum[l] += windows[q][2 * d] * tiles[t][(d * TILE + l) * 2] +
                              windows[q][2 * d + 1] * tiles[t][(d * TILE + l) * 2 + 1];
            out[t][q] = sum;
        }
#endif
}

// Negated squared distances of QUERIES queries from TILES tiles of windows; even and odd values in separate sums where
// that fills the pipeline. Every RUN values have a sum of their own, which keeps the rounding error of wide windows
// small.
template <int QUERIES, int TILES>
__attribute__((noinline)) static void meet(const float* const* tiles, int pairs, const float* const* windows,
                                           F (*out)[4]) {
    constexpr int STEP = QUERIES * TILES < 8 ? 2 : 1, RUN = 64;
    for (int t = 0; t < TILES; ++t)
        for (int q = 0; q < QUERIES; ++q) out[t][q] = F{};
    for (int d = 0; d < 2 * pairs;) {
        F acc[STEP][TILES][QUERIES];
        for (auto& half : acc)
            for (auto& tile : half)
                for (F& sum : tile) sum = F{};
        for (const int end = d + RUN < 2 * pairs ? d + RUN : 2 * pairs; d < end; d += STEP)
            for (int h = 0; h < STEP; ++h) {
                F window[TILES];
                for (int t = 0; t < TILES; ++t) window[t] = load(tiles[t] + (d + h) * TILE);
                for (int q = 0; q < QUERIES; ++q)
                    for (int t = 0; t < TILES; ++t) {
                        const F away = window[t] - windows[q][d + h];
                        acc[h][t][q] -= away * away;
                    }
            }
        for (int t = 0; t < TILES; ++t)
            for (int q = 0; q < QUERIES; ++q)
                out[t][q] += STEP == 2 ? acc[0][t][q] + acc[STEP - 1][t][q] : acc[0][t][q];
    }
}

// The queries of up to 4 visits with one tile or two.
template <typename Tile, typename Query, typename Scores>
PS_INLINE void meet_all(const Tile* const* tiles, int count, int pairs, const Query* const* windows, int many,
                        Scores (*out)[4]) {
    if (count == 2) {
        if (many == 1)
            meet<1, 2>(tiles, pairs, windows, out);
        else if (many == 2)
            meet<2, 2>(tiles, pairs, windows, out);
        else
            meet<4, 2>(tiles, pairs, windows, out);
    } else {
        if (many == 1)
            meet<1, 1>(tiles, pairs, windows, out);
        else if (many == 2)
            meet<2, 1>(tiles, pairs, windows, out);
        else
            meet<4, 1>(tiles, pairs, windows, out);
    }
}

// A score from a tile's facts and the result of `meet`: dot - 2^shift |p|^2 of bytes, -|q - p|^2 of floats.
PS_INLINE I score_of(I dot, I norm, int shift) { return dot - (norm << shift); }
// A damaged tile may hold anything: a distance that is not finite is that of no window.
PS_INLINE F score_of(F score, F, int) { return score - score == 0.0f ? score : broadcast(-FLT_MAX); }

template <typename Pixel>
PS_INLINE const QueryOf<Pixel>* window_of(const Request& request, int query) {
    return static_cast<const QueryOf<Pixel>*>(request.windows) + int64_t(query) * 2 * request.images.pairs();
}

// The scores of up to 4 queries with a tile; NONE where no window competes.
template <typename Pixel, int MOST>
static void compare_tile(const Request& request, const ScanVisit* visits, int many, const StoredOf<Pixel>* tile,
                         const TileFacts<Pixel, MOST>& facts, ScoreOf<Pixel> (*out)[TILE]) {
    typedef typename VectorOf<Pixel>::Scores Scores;
    const QueryOf<Pixel>* windows[4];
    for (int i = 0; i < 4; ++i) windows[i] = window_of<Pixel>(request, visits[i < many ? i : 0].query);
    Scores met[1][4];
    meet_all(&tile, 1, request.images.pairs(), windows, many, met);
    for (int i = 0; i < many; ++i) {
        const Scores t = score_of(met[0][i], facts.norm, request.shift[visits[i].query]);
        const Scores seen = facts.present ? t : Scores{} + Held<Pixel>::NONE;
        for (int l = 0; l < TILE; ++l) out[i][l] = seen[l];
    }
}

PS_INLINE float sum_of(F x) {
    typedef float v4 __attribute__((vector_size(16)));
    v4 low, high;
    __builtin_memcpy(&low, &x, 16);
    __builtin_memcpy(&high, (const char*)&x + 16, 16);
    low += high;
    return (low[0] + low[2]) + (low[1] + low[3]);
}

// The score of one query with one window, whose pixels are at hand.
PS_INLINE int32_t compare_pixels(const int16_t* query, const uint8_t* bytes, int values, int shift) {
    int32_t dot = 0, norm = 0;
    int d = 0;
#if PS_LEVEL >= 256
    __m256i dots = _mm256_setzero_si256(), norms = dots;
    for (; d + 16 <= values; d += 16) {
        const __m128i centred =
            _mm_xor_si128(_mm_loadu_si128((const __m128i*)(bytes + d)), _mm_set1_epi8(int8_t(0x80)));
        const __m256i p = _mm256_cvtepi8_epi16(centred);
        dots = _mm256_add_epi32(dots, _mm256_madd_epi16(p, _mm256_loadu_si256((const __m256i*)(query + d))));
        norms = _mm256_add_epi32(norms, _mm256_madd_epi16(p, p));
    }
    for (int l = 0; l < TILE; ++l) dot += ((I)dots)[l], norm += ((I)norms)[l];
#endif
    for (; d < values; ++d) {
        const int32_t byte = int32_t(bytes[d]) - 128;
        dot += query[d] * byte, norm += byte * byte;
    }
    return dot - (norm << shift);
}

PS_INLINE float compare_pixels(const float* query, const float* pixels, int values, int) {
    F sums{};
    int d = 0;
    for (; d + TILE <= values; d += TILE) {
        const F away = load(query + d) - load(pixels + d);
        sums += away * away;
    }
    float sum = sum_of(sums);
    for (; d < values; ++d) sum += (query[d] - pixels[d]) * (query[d] - pixels[d]);
    return -sum;
}

// The score of one query with a window in its image. `room` is for its pixels.
template <typename Pixel>
static ScoreOf<Pixel> compare_window(const Request& request, int query, int64_t id, Pixel* room) {
    copy_window(request.images, id, room);
    return compare_pixels(window_of<Pixel>(request, query), room, request.images.values(), request.shift[query]);
}

// Lane sums of a visit: w, w^2, then w v, w^2 v, w^2 v^2 of each channel.
template <typename Pixel, int MOST>
struct Lanes {
    F w, w2, wv[MOST], w2v[MOST], w2v2[MOST];
    typename VectorOf<Pixel>::Scores largest;
};

// The further sums of moments, about the query's centre: see VisitedMoments.
template <int MOST>
struct MomentLanes {
    F wu[MOST], wq[MOST], wx;
    F w2u[MOST], w2q[MOST], w2uq[MOST], w2qq[MOST], w2x, w2x2;
};

template <bool MOMENTS, typename Pixel, int MOST>
PS_INLINE void weigh(typename VectorOf<Pixel>::Scores t, const TileFacts<Pixel, MOST>& facts, ScoreOf<Pixel> ref,
                     float bits, const KnownOf<Pixel>& known, int channels, const float* centre,
                     Lanes<Pixel, MOST>& sums, MomentLanes<MOST>& more, KnownOf<Pixel>& found) {
    typedef typename VectorOf<Pixel>::Scores Scores;
    I present = facts.present & (t != Held<Pixel>::NONE);
    const I heavy = present & (t >= Held<Pixel>::about(known.least));
    if (__builtin_expect(any(heavy), 0))
        for (int l = 0; l < TILE; ++l)
            if (heavy[l]) {
                if (known.holds(facts.ids[l]))
                    present[l] = 0;
                else
                    found.offer(t[l], facts.ids[l], 0, MOST_KNOWN);
            }
    const Scores seen = present ? t : Scores{} + Held<Pixel>::NONE;
    sums.largest = seen > sums.largest ? seen : sums.largest;
    F x = __builtin_convertvector(t - ref, F) * bits;
    x = x < 60.0f ? x : broadcast(60);
    F w = weight_at(x);
    w = present ? w : F{};
    const F w2 = w * w;
    sums.w += w, sums.w2 += w2;
    for (int c = 0; c < channels; ++c) {
        const F v = facts.value[c], w2v = w2 * v;
        sums.wv[c] += w * v, sums.w2v[c] += w2v, sums.w2v2[c] += w2v * v;
    }
    if (MOMENTS) {
        const F wx = w * x;
        more.wx += wx, more.w2x += w * wx, more.w2x2 += wx * wx;
        for (int c = 0; c < channels; ++c) {
            const F u = facts.value[c] - centre[c], q = u * u, w2q = w2 * q;
            more.wu[c] += w * u, more.wq[c] += w * q;
            more.w2u[c] += w2 * u, more.w2q[c] += w2q, more.w2uq[c] += w2q * u, more.w2qq[c] += w2q * q;
        }
    }
}

// Sums of up to 4 visits over their tiles; tile t of a visit is tiles[(first + t) % count]. All start at the same tile,
// the first has the most. refs: scores of each query about which it sums. out: w, w^2, then w v, w^2 v, w^2 v^2 of each
// channel; more with MOMENTS alone.
template <bool MOMENTS, typename Pixel, int MOST>
static void scan_tiles(const Request& request, const StoredOf<Pixel>* const* tiles, const TileFacts<Pixel, MOST>* facts,
                       int count, const ScanVisit* visits, int many, const ScoreOf<Pixel>* refs,
                       const KnownOf<Pixel>* known, const float* centres, KnownOf<Pixel>* const* found,
                       Visited<Pixel, MOST>* out, VisitedMoments<MOST>* more_out) {
    typedef typename VectorOf<Pixel>::Scores Scores;
    const int pairs = request.images.pairs(), channels = request.images.channels, all = many;
    const QueryOf<Pixel>* windows[4];
    Lanes<Pixel, MOST> sums[4];
    MomentLanes<MOST> more[MOMENTS ? 4 : 1];
    for (int i = 0; i < 4; ++i) windows[i] = window_of<Pixel>(request, visits[i < many ? i : 0].query);
    for (int i = 0; i < many; ++i) {
        sums[i] = Lanes<Pixel, MOST>{};
        sums[i].largest = Scores{} + Held<Pixel>::NONE;
        if (MOMENTS) more[i] = MomentLanes<MOST>{};
    }
    for (int t = 0; t < visits[0].tiles;) {
        while (many > 1 && visits[many - 1].tiles <= t) --many;
        const int both = many > 1 && t + 1 < visits[many - 1].tiles ? 2 : many == 1 && t + 1 < visits[0].tiles ? 2 : 1;
        const StoredOf<Pixel>* of[2];
        const TileFacts<Pixel, MOST>* about[2];
        for (int j = 0; j < both; ++j) {
            const int at = (visits[0].first + t + j) % count;
            of[j] = tiles[at], about[j] = &facts[at];
        }
        Scores met[2][4];
        meet_all(of, both, pairs, windows, many, met);
        for (int i = 0; i < many; ++i) {
            const int query = visits[i].query;
            const float bits = float(request.bits[query]);
            for (int j = 0; j < both; ++j)
                weigh<MOMENTS>(score_of(met[j][i], about[j]->norm, request.shift[query]), *about[j], refs[query], bits,
                               known[query], channels, MOMENTS ? centres + int64_t(query) * channels : nullptr, sums[i],
                               more[MOMENTS ? i : 0], *found[i]);
        }
        t += both;
    }
    for (int i = 0; i < all; ++i) {
        Visited<Pixel, MOST>& to = out[i];
        to.w = sum_of(sums[i].w), to.w2 = sum_of(sums[i].w2);
        for (int c = 0; c < channels; ++c)
            to.wv[c] = sum_of(sums[i].wv[c]), to.w2v[c] = sum_of(sums[i].w2v[c]), to.w2v2[c] = sum_of(sums[i].w2v2[c]);
        to.largest = Held<Pixel>::NONE;
        for (int l = 0; l < TILE; ++l)
            if (sums[i].largest[l] > to.largest) to.largest = sums[i].largest[l];
        if (!MOMENTS) continue;
        VisitedMoments<MOST>& to_more = more_out[i];
        const MomentLanes<MOST>& of = more[MOMENTS ? i : 0];
        to_more.wx = sum_of(of.wx), to_more.w2x = sum_of(of.w2x), to_more.w2x2 = sum_of(of.w2x2);
        for (int c = 0; c < channels; ++c) {
            to_more.wu[c] = sum_of(of.wu[c]), to_more.wq[c] = sum_of(of.wq[c]);
            to_more.w2u[c] = sum_of(of.w2u[c]), to_more.w2q[c] = sum_of(of.w2q[c]);
            to_more.w2uq[c] = sum_of(of.w2uq[c]), to_more.w2qq[c] = sum_of(of.w2qq[c]);
        }
    }
}
