// The sliding engine on the GPU: exact window distances from tensor cores.
//
// Pixels are bytes and noisy pixels fixed-point numbers of three signed bytes, so |q - p|^2 = |q|^2 + |p|^2 - 2 q.p is
// taken in integers, where nothing is rounded and nothing cancels. Along a diagonal q.p slides: one matrix product adds
// the row that enters and takes away the one that leaves. patchscore/engines/sliding/cuda.py prepares the operands.
//
// A quad is four channels of one pixel as four signed bytes, the unit of all operands (channels beyond the last are 0).
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <set>
#include <type_traits>
#include <utility>

#include "cuda_device.h"

namespace patchscore {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int QUERIES = 16;                 // query columns of a block: the rows of a product's tile
constexpr int TILES = 4, TILE = 8;          // a warp's tiles of window columns; tiles may be of different images
// In shared memory the quads of a noisy pixel lie together, and those of TILES tiles at one column; such strides leave
// the eleven columns that a warp reads at a time in different banks.
constexpr int Q_QUADS = 3, P_QUADS = TILES + 1;
constexpr float RISE = 65536.f;             // a sum of weights above it moves the reference
constexpr float NEGLIGIBLE = 0x1p-34f;      // of the sum so far: eight windows that weigh less are skipped

// One axis of a group: query coordinates [q0, q1) against window centres [w0, w1), or each against itself (locked).
struct Axis {
    int q0, q1, w0, w1, locked;
};

// One group of a competition: noisy images against a slab of training images. ctypes mirrors it.
struct Windows {
    int channel_quads, planes, values_per_pixel, height, width, patch_size, circular;
    Axis rows, cols;
    int images, items;
    int strip;                  // query rows of a block
    int groups_per_chunk;       // groups of TILES tiles that a block goes through
    int multiplier, base;       // see `distance` below
    int moments;                // also sum w log2 w and w value^2, of values relative to the query's centre
    int outside[4];             // quads beyond the noisy image's border, unless circular
    const int* quads;           // [images][planes][channel_quads][height][width]
    const float* values;        // [images][height][width][1, or 4]: what is averaged; TILE pixels more are read
    const int* norms;           // [images][height][width]: |p|^2 of the window centred there
    const float* fractions;     // the same size: what rounding took from `norms`; for 3 planes
    const int4* digits;         // [items][channel_quads][height][width]: the three quads of a noisy pixel
    const float2* scale;        // [items]: bits per unit of `norms`, and per unit of the lower digits
    const float* centres;       // [items][height][width][1, or 4]: near the values of heavy windows; for moments
    int* references;            // [chunks][items][height][width][2]
    float* sums;                // [chunks][items][parts][height][width]: s, s2, v, and with moments sl and v2
};

__host__ __device__ constexpr int parts_of(int values, bool moments) { return 2 + values + (moments ? 1 + values : 0); }

__host__ __device__ inline int columns_of(const Axis& axis, int j0) {
    const int left = axis.q1 - j0;
    return axis.locked ? (left < QUERIES ? left : QUERIES) : axis.w1 - axis.w0;
}

__host__ __device__ inline int at_most(int a, int b) { return a < b ? a : b; }
__host__ __device__ inline int at_least(int a, int b) { return a > b ? a : b; }

// A chunk's blocks: strips of query rows, times QUERIES columns.
__host__ __device__ inline int row_blocks(const Windows& t) { return (t.rows.q1 - t.rows.q0 + t.strip - 1) / t.strip; }
__host__ __device__ inline int column_blocks(const Windows& t) { return (t.cols.q1 - t.cols.q0 + QUERIES - 1) / QUERIES; }

// The diagonals wrap around: every query row competes and the block holds them all.
__host__ __device__ inline bool wraps(const Windows& t) {
    return t.circular && !t.rows.locked && t.rows.q0 == 0 && t.rows.q1 == t.height && t.strip >= t.height;
}

// How a block lays out its shared memory, in bytes from its start.
struct Layout {
    int steps;                  // products a row of the patch takes, four columns each
    int q_rows, q_pitch;        // in noisy pixels
    int p_rows, p_pitch;        // in columns
    int window_rows;
    int negative, zeros, values, pairs, sums, windows, norms, fractions, end;

    __host__ __device__ Layout(const Windows& t, int parts) {
        const int k = t.patch_size;
        steps = (k + 3) / 4;
        q_rows = wraps(t) ? t.height : t.strip + k - 1;
        q_pitch = QUERIES + 4 * steps;
        window_rows = t.rows.locked ? t.strip : t.rows.w1 - t.rows.w0;
        p_rows = window_rows + k - 1;
        p_pitch = TILE + 4 * steps;
        negative = t.channel_quads * q_rows * q_pitch * Q_QUADS * 4;
        zeros = 2 * negative;
        values = zeros + 9 * Q_QUADS * 4;
        pairs = values + TILES * 4;
        sums = (pairs + 32 * 4 + 15) / 16 * 16;
        windows = sums + t.strip * 32 * 8 * (2 + parts);
        norms = (windows + t.planes * t.channel_quads * p_rows * p_pitch * P_QUADS * 4 + 15) / 16 * 16;
        fractions = norms + TILES * window_rows * TILE * 4;
        end = fractions + (t.planes > 1 ? TILES * window_rows * TILE * 4 : 0);
    }
};

// The layout of a launch. The kernel knows its number of parts at compile time, which saves a register.
static Layout layout_of(const Windows& t) { return {t, parts_of(t.values_per_pixel, t.moments)}; }

__device__ __forceinline__ int negated(int quad) {
    int result = 0;
    for (int shift = 0; shift < 32; shift += 8) result |= (-(quad >> shift) & 255) << shift;
    return result;
}

// Adds the products of two pairs of patch rows to q.p. Pointers are to a thread's own column.
// products[order]: by the significance of the digits multiplied, the most significant first.
struct Pointers {
    const int *q_first, *q_second, *p_first, *p_second;
    bool two;                   // whether there is a second pair
};

template <int PLANES>
__device__ __forceinline__ void add_rows(int (&products)[3][TILES][4], Pointers at, const int* zeros, int quad, int k,
                                         int plane_ints) {
#pragma unroll 1
    for (int column = quad; column < k + quad; column += 4) {
        // Columns beyond the patch read zeros.
        const int* first = column < k ? at.q_first : zeros;
        const int* second = column < k && at.two ? at.q_second : zeros;
        int a[Q_QUADS][4];
#pragma unroll
        for (int digit = 0; digit < Q_QUADS; ++digit) {
            a[digit][0] = first[digit], a[digit][1] = first[8 * Q_QUADS + digit];
            a[digit][2] = second[digit], a[digit][3] = second[8 * Q_QUADS + digit];
        }
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane)
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                const int b0 = at.p_first[plane * plane_ints + n], b1 = at.p_second[plane * plane_ints + n];
#pragma unroll
                for (int digit = 0; digit + plane < 3; ++digit)
                    multiply(products[digit + plane][n], a[digit][0], a[digit][1], a[digit][2], a[digit][3], b0, b1);
            }
        at.q_first += 4 * Q_QUADS, at.q_second += 4 * Q_QUADS;
        at.p_first += 4 * P_QUADS, at.p_second += 4 * P_QUADS;
    }
}

// The CV values of a pixel, stored singly (CV = 1) or in fours.
template <int CV, typename Index>
__device__ __forceinline__ void read_pixel(float (&value)[4], const float* pixels, Index at) {
    if (CV == 1) {
        value[0] = pixels[at];
    } else {
        const float4 four = reinterpret_cast<const float4*>(pixels)[at];
        value[0] = four.x, value[1] = four.y, value[2] = four.z, value[3] = four.w;
    }
}

// The block: QUERIES columns of a strip of query rows, in registers and shared memory, against a chunk of the slab. All
// warps hold the same group of TILES tiles; each walks a displacement of its own, so at any time they serve different
// query rows and share the sums without a conflict.
template <int PLANES, int CV, bool MOMENTS>
__global__ void __launch_bounds__(THREADS, PLANES == 1 && !MOMENTS ? 2 : 1) windows_kernel(const Windows t) {
    // A lane's sums: two of the reference, then the parts.
    constexpr int PARTS = parts_of(CV, MOMENTS), KEPT = 2 + PARTS, ENTROPY = 4 + CV, SQUARES = ENTROPY + 1;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row_of_lane = lane >> 2, quad = lane & 3;
    const int k = t.patch_size, r = k / 2, H = t.height, W = t.width;
    // Blocks of one chunk side by side, so that its windows are read from memory once.
    const int col_blocks = column_blocks(t), query_blocks = row_blocks(t) * col_blocks, item = blockIdx.z;
    const int chunk = int(blockIdx.x) / query_blocks, query_block = int(blockIdx.x) % query_blocks;
    const int i0 = t.rows.q0 + query_block / col_blocks * t.strip, i1 = at_most(i0 + t.strip, t.rows.q1);
    const int j0 = t.cols.q0 + query_block % col_blocks * QUERIES;
    const int a0 = t.rows.locked ? i0 : t.rows.w0, a1 = t.rows.locked ? i1 : t.rows.w1;
    const bool wrapping = wraps(t);
    const Layout layout(t, PARTS);

    char* const memory = reinterpret_cast<char*>(shared_memory());
    int* const q_plus = reinterpret_cast<int*>(memory);  // [channel_quads][rows][pitch][Q_QUADS]
    int* const q_minus = reinterpret_cast<int*>(memory + layout.negative);
    int* const zeros = reinterpret_cast<int*>(memory + layout.zeros);
    int* const values_of_tile = reinterpret_cast<int*>(memory + layout.values);
    unsigned* const pairs_of_lane = reinterpret_cast<unsigned*>(memory + layout.pairs);
    float2* const sums = reinterpret_cast<float2*>(memory + layout.sums);  // [strip][KEPT][lanes]
    int* const p = reinterpret_cast<int*>(memory + layout.windows);        // [planes][channel_quads][rows][pitch][P_QUADS]
    int* const norms = reinterpret_cast<int*>(memory + layout.norms);      // [window rows][TILES][TILE]
    float* const fractions = reinterpret_cast<float*>(memory + layout.fractions);

    // Noisy pixels of the strip and around it, and their negatives.
    const int q_rows = layout.q_rows, q_pitch = layout.q_pitch;
#pragma unroll 1
    for (int x = threadIdx.x; x < t.channel_quads * q_rows * q_pitch; x += THREADS) {
        const int col = x % q_pitch, row = x / q_pitch % q_rows, c = x / q_pitch / q_rows;
        int i = wrapping ? row : i0 - r + row, j = j0 - r + col;
        if (t.circular) i = (i % H + H) % H, j = (j % W + W) % W;
        int4 digits = {t.outside[0], t.outside[1], t.outside[2], 0};
        if (i >= 0 && i < H && j >= 0 && j < W) digits = t.digits[((int64_t(item) * t.channel_quads + c) * H + i) * W + j];
        const int three[Q_QUADS] = {digits.x, digits.y, digits.z};
        for (int digit = 0; digit < Q_QUADS; ++digit) {
            q_plus[x * Q_QUADS + digit] = three[digit];
            q_minus[x * Q_QUADS + digit] = negated(three[digit]);
        }
    }
    if (threadIdx.x < 9 * Q_QUADS) zeros[threadIdx.x] = 0;
    if (threadIdx.x < TILES) values_of_tile[threadIdx.x] = 0;
#pragma unroll 1
    for (int x = threadIdx.x; x < t.strip * KEPT * 32; x += THREADS) {
        const bool reference = x / 32 % KEPT < 2;  // farther than anything
        sums[x] = {reference ? bits_as_float(1 << 30) : 0.f, 0.f};
    }

    const int columns = columns_of(t.cols, j0), first_column = t.cols.locked ? j0 : t.cols.w0;
    const int tiles_per_image = (columns + TILE - 1) / TILE;
    const int all_tiles = t.images * tiles_per_image;
    const int first_group = chunk * t.groups_per_chunk;
    const float2 scale = t.scale[item];
    const int q_row = q_pitch * Q_QUADS, q_quad = q_rows * q_row;
    const int p_row = layout.p_pitch * P_QUADS, p_quad = layout.p_rows * p_row, p_plane = p_quad * t.channel_quads;

    for (int group = first_group; group < first_group + t.groups_per_chunk && group * TILES < all_tiles; ++group) {
        // Training pixels, zero outside, and norms of this group's tiles.
        __syncthreads();
        const int p_columns = layout.p_pitch, p_pixels = layout.p_rows * p_columns * t.channel_quads * PLANES;
#pragma unroll 1
        for (int x = threadIdx.x; x < TILES * p_pixels; x += THREADS) {
            const int n = x / p_pixels, y = x % p_pixels;
            const int col = y % p_columns, row = y / p_columns % layout.p_rows, part = y / p_columns / layout.p_rows;
            const int tile = group * TILES + n;
            const int a = a0 - r + row, b = first_column + tile % tiles_per_image * TILE - r + col;
            const bool inside = tile < all_tiles && a >= 0 && a < H && b >= 0 && b < W;
            const int64_t plane = int64_t(tile / tiles_per_image) * PLANES * t.channel_quads + part;
            p[y * P_QUADS + n] = inside ? t.quads[(plane * H + a) * W + b] : 0;
        }
#pragma unroll 1
        for (int x = threadIdx.x; x < layout.window_rows * TILES * TILE; x += THREADS) {
            const int tile = group * TILES + x / TILE % TILES;
            const int a = a0 + x / TILE / TILES, b = first_column + tile % tiles_per_image * TILE + x % TILE;
            const bool inside = tile < all_tiles && a < a1 && b < W;
            const int from = (tile / tiles_per_image * H + a) * W + b;
            norms[x] = inside ? t.norms[from] : 0;
            if (PLANES > 1) fractions[x] = inside ? t.fractions[from] : 0.f;
        }
        // Bits of a thread's pairs (two queries, TILES tiles, two columns) that exist, the same in all warps, and where
        // values are. Most tiles are whole, so the bits stay in shared memory rather than in a register.
        unsigned exist = 0;
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            const int tile = group * TILES + n;
            const int b = tile % tiles_per_image * TILE + 2 * quad;
            for (int e = 0; e < 2; ++e)
                for (int jj = 0; jj < 2; ++jj) {
                    const bool matches = !t.cols.locked || b + e == row_of_lane + 8 * jj;
                    if (tile < all_tiles && b + e < columns && matches) exist |= 1u << (jj * 8 + n * 2 + e);
                }
            if (threadIdx.x == 0 && tile < all_tiles)
                values_of_tile[n] = tile / tiles_per_image * H * W + first_column + b;
        }
        if (warp == 0) pairs_of_lane[lane] = exist;
        const bool all_exist = !any_lane(exist != 0xffffu);
        __syncthreads();

        // A round gives every warp a displacement d = a - i, or a part of the one that locked rows have.
        const int first_d = wrapping ? 0 : a0 - (i1 - 1), last_d = wrapping ? H - 1 : a1 - 1 - i0;
        const int part = (i1 - i0 + WARPS - 1) / WARPS;
        for (int round_d = t.rows.locked ? 0 : first_d; round_d <= (t.rows.locked ? 0 : last_d); round_d += WARPS) {
            const int d = t.rows.locked ? 0 : round_d + warp, top_d = at_most(round_d + WARPS - 1, last_d);
            int lo = a0, hi = a1, start = a0, length = a1 - a0;
            if (t.rows.locked) {
                lo = start = a0 + warp * part, hi = at_most(lo + part, a1), length = part;
            } else if (!wrapping) {
                lo = at_least(a0, i0 + d), hi = at_most(a1, i1 + d);
                start = at_least(a0, i0 + round_d), length = at_most(a1, i1 + top_d) - start;
            }
            if (d > last_d && !t.rows.locked) hi = lo;
            int products[3][TILES][4];
            for (int step = 0; step < length; ++step) {
                const int a = start + step;
                if (a >= lo && a < hi) {
                    const int i = a - d < 0 && wrapping ? a - d + H : a - d;
                    const int own = row_of_lane + quad;
                    auto slot = [&](int row) {  // where the patch's query rows are
                        const int at = i + row - (wrapping ? r : i0);
                        return !wrapping ? at : at < 0 ? at + H : at >= H ? at - H : at;
                    };
                    if (a == lo) {
                        // The first window: all its rows, two at a time.
#pragma unroll
                        for (int x = 0; x < 3 * TILES * 4; ++x) products[x / (4 * TILES)][x / 4 % TILES][x % 4] = 0;
                        for (int row = 0; row < k; row += 2)
                            for (int c = 0; c < t.channel_quads; ++c) {
                                const int* q = q_plus + c * q_quad + own * Q_QUADS;
                                const int* at = p + c * p_quad + (a - a0 + row) * p_row + own * P_QUADS;
                                const bool two = row + 1 < k;
                                const Pointers rows = {q + slot(row) * q_row, q + slot(row + two) * q_row, at,
                                                       at + two * p_row, two};
                                add_rows<PLANES>(products, rows, zeros, quad, k, p_plane);
                            }
                    } else {
                        for (int c = 0; c < t.channel_quads; ++c) {
                            const int q = c * q_quad + own * Q_QUADS;
                            const int* at = p + c * p_quad + (a - a0) * p_row + own * P_QUADS;
                            const Pointers rows = {q_plus + q + slot(k - 1) * q_row, q_minus + q + slot(-1) * q_row,
                                                   at + (k - 1) * p_row, at - p_row, true};
                            add_rows<PLANES>(products, rows, zeros, quad, k, p_plane);
                        }
                    }

                    // distance = norm - multiplier x product of the top digits - fine part (the lower digits), each
                    // relative to the reference; a weight is 2^-(distance x scale).
                    float2* const mine = sums + (i - i0) * KEPT * 32 + lane;
                    const int2* norm = reinterpret_cast<const int2*>(norms + (a - a0) * TILES * TILE) + quad;
                    const float2* fraction = reinterpret_cast<const float2*>(fractions + (a - a0) * TILES * TILE) + quad;
                    float w[2][2 * TILES], total[2];
#pragma unroll
                    for (int jj = 0; jj < 2; ++jj) {
                        const float2 reference = mine[jj * 32];
                        int coarse = bits_as_int(reference.x), fine = bits_as_int(reference.y);
                        auto bits = [&](int n, int e, int high, int low) {
                            float bits = float(low - fine) * scale.y - float(high - coarse) * scale.x;
                            if (PLANES > 1) {
                                const float2 rest = fraction[n * (TILE / 2)];
                                bits -= (e ? rest.y : rest.x) * scale.x;
                            }
                            return bits;
                        };
                        auto high = [&](int n, int e) {
                            const int2 two = norm[n * (TILE / 2)];
                            return (e ? two.y : two.x) - products[0][n][2 * jj + e] * t.multiplier;
                        };
                        auto low = [&](int n, int e) {
                            return products[1][n][2 * jj + e] * t.base + products[2][n][2 * jj + e];
                        };
                        // At most twice: the first reference is beyond all distances, and relative to it a float
                        // resolves 64 units only, which at low noise exceeds the range of a weight.
#pragma unroll 1
                        for (int risen = 0;; ++risen) {
#pragma unroll
                            for (int x = 0; x < 2 * TILES; ++x)
                                w[jj][x] = power_of_two(bits(x / 2, x % 2, high(x / 2, x % 2), low(x / 2, x % 2)));
                            if (!all_exist) {
                                __syncwarp();  // keeps the branch: the compiler would select, and most tiles are whole
#pragma unroll
                                for (int x = 0; x < 2 * TILES; ++x)
                                    if (!(pairs_of_lane[lane] >> (8 * jj + x) & 1)) w[jj][x] = 0.f;
                            }
                            total[jj] = 0.f;
#pragma unroll
                            for (int x = 0; x < 2 * TILES; ++x) total[jj] += w[jj][x];
                            if (risen == 2 || !any_lane(total[jj] > RISE)) break;  // the same in all lanes
                            if (total[jj] <= RISE) continue;
                            // A window is much nearer than the reference: it becomes the reference.
                            float most = -INFINITY;
                            int new_coarse = coarse, new_fine = fine;
#pragma unroll
                            for (int x = 0; x < 2 * TILES; ++x) {
                                const float one = bits(x / 2, x % 2, high(x / 2, x % 2), low(x / 2, x % 2));
                                if ((pairs_of_lane[lane] >> (8 * jj + x) & 1) && one > most)
                                    most = one, new_coarse = high(x / 2, x % 2), new_fine = low(x / 2, x % 2);
                            }
                            const float fade = power_of_two(-most);
                            coarse = new_coarse, fine = new_fine;
                            mine[jj * 32] = {bits_as_float(coarse), bits_as_float(fine)};
                            if (MOMENTS) {  // log2 w of every window changes by the same amount
                                const float2 s = mine[2 * 32];
                                float2& sl = mine[ENTROPY * 32];
                                (jj ? sl.y : sl.x) -= most * (jj ? s.y : s.x);
                            }
#pragma unroll
                            for (int part = 2; part < KEPT; ++part) {
                                float2& sum = mine[part * 32];
                                (jj ? sum.y : sum.x) *= part == 3 ? fade * fade : fade;
                            }
                        }
                    }

                    const float2 s = mine[2 * 32];
                    if (any_lane(total[0] > NEGLIGIBLE * s.x || total[1] > NEGLIGIBLE * s.y)) {
                        mine[2 * 32] = {s.x + total[0], s.y + total[1]};
                        // Half an instruction more per pair; otherwise four channels on sm_80 lack a register.
                        using Index = std::conditional_t<CV == 4, unsigned, int>;
                        float2 s2 = mine[3 * 32];
                        float v[CV][2], v2[MOMENTS ? CV : 1][2], sl[2] = {0.f, 0.f};
#pragma unroll
                        for (int c = 0; c < CV; ++c) v[c][0] = v[c][1] = 0.f;
                        float centre[2][4];
                        if (MOMENTS) {
#pragma unroll
                            for (int c = 0; c < CV; ++c) v2[c][0] = v2[c][1] = 0.f;
#pragma unroll
                            for (int jj = 0; jj < 2; ++jj) {  // a lane beyond the last query repeats it
                                const int j = at_most(j0 + row_of_lane + 8 * jj, t.cols.q1 - 1);
                                read_pixel<CV>(centre[jj], t.centres, (int64_t(item) * H + i) * W + j);
                            }
                        }
#pragma unroll
                        for (int x = 0; x < 2 * TILES; ++x) {
                            const Index at = values_of_tile[x / 2] + a * W + 2 * quad + x % 2;
                            float value[4];
                            read_pixel<CV>(value, t.values, at);
#pragma unroll
                            for (int jj = 0; jj < 2; ++jj) {
                                (jj ? s2.y : s2.x) += w[jj][x] * w[jj][x];
                                if (MOMENTS && w[jj][x] > 0.f) sl[jj] += w[jj][x] * log2_of(w[jj][x]);
#pragma unroll
                                for (int c = 0; c < CV; ++c) {
                                    const float offset = MOMENTS ? value[c] - centre[jj][c] : value[c];
                                    v[c][jj] += w[jj][x] * offset;
                                    if (MOMENTS) v2[c][jj] += w[jj][x] * offset * offset;
                                }
                            }
                        }
                        mine[3 * 32] = s2;
#pragma unroll
                        for (int c = 0; c < CV; ++c) {
                            const float2 before = mine[(4 + c) * 32];
                            mine[(4 + c) * 32] = {before.x + v[c][0], before.y + v[c][1]};
                        }
                        if (MOMENTS) {
                            const float2 entropy = mine[ENTROPY * 32];
                            mine[ENTROPY * 32] = {entropy.x + sl[0], entropy.y + sl[1]};
#pragma unroll
                            for (int c = 0; c < CV; ++c) {
                                const float2 before = mine[(SQUARES + c) * 32];
                                mine[(SQUARES + c) * 32] = {before.x + v2[c][0], before.y + v2[c][1]};
                            }
                        }
                    }
                }
                __syncthreads();
            }
        }
    }

    // The four lanes that share a query, in their order.
    __syncthreads();
    for (int x = threadIdx.x; x < (i1 - i0) * QUERIES; x += THREADS) {
        const int i = i0 + x / QUERIES, column = x % QUERIES, j = j0 + column, jj = column / 8;
        if (j >= t.cols.q1) continue;
        const float2* of = sums + (i - i0) * KEPT * 32 + column % 8 * 4;
        auto half = [&](const float2& two) { return jj ? two.y : two.x; };
        int nearest = 0;
        auto bits = [&](int from, int to) {  // log2 of what a weight relative to `from` is relative to `to`
            const float2 one = of[jj * 32 + from], other = of[jj * 32 + to];
            return float(bits_as_int(other.x) - bits_as_int(one.x)) * scale.x -
                   float(bits_as_int(other.y) - bits_as_int(one.y)) * scale.y;
        };
        for (int l = 1; l < 4; ++l)
            if (!(half(of[2 * 32 + nearest]) > 0.f) || (half(of[2 * 32 + l]) > 0.f && bits(l, nearest) > 0.f)) nearest = l;
        float parts[PARTS];
        for (int c = 0; c < PARTS; ++c) parts[c] = 0.f;
        for (int l = 0; l < 4; ++l) {
            if (!(half(of[2 * 32 + l]) > 0.f)) continue;
            const float fade = l == nearest ? 1.f : power_of_two(bits(l, nearest));
            for (int c = 0; c < PARTS; ++c) parts[c] += half(of[(2 + c) * 32 + l]) * (c == 1 ? fade * fade : fade);
            if (MOMENTS && l != nearest) parts[ENTROPY - 2] += half(of[2 * 32 + l]) * bits(l, nearest) * fade;
        }
        const int64_t plane = int64_t(H) * W, pixel = int64_t(i) * W + j, place = int64_t(chunk) * t.items + item;
        t.references[(place * plane + pixel) * 2] = bits_as_int(of[jj * 32 + nearest].x);
        t.references[(place * plane + pixel) * 2 + 1] = bits_as_int(of[jj * 32 + nearest].y);
        for (int c = 0; c < PARTS; ++c) t.sums[(place * PARTS + c) * plane + pixel] = parts[c];
    }
}

// Training images as the windows kernel reads them. ctypes mirrors it.
struct Pack {
    int channels, height, width, images, bytes, base;
    int first_value, values_per_pixel;
    const void* raw;            // [.., channels, height, width], bytes (v = u / 127.5 - 1) or float
    const int64_t* indices;     // [images] positions in `raw`, or null
    int* quads;                 // [images][planes][channel_quads][height][width]
    float* values;              // [images][height][width][1, or 4]: channels first_value and on
    double* squares;            // [images][height][width]: sum of squared channels
};

// In units of a byte's step, p = 127.5 v - 0.5 is a whole number for bytes; floats have two more digits.
__global__ void __launch_bounds__(THREADS) pack_kernel(const Pack t) {
    const int64_t plane = int64_t(t.height) * t.width, x = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (x >= plane * t.images) return;
    const int64_t image = x / plane, pixel = x % plane, from = t.indices ? t.indices[image] : image;
    const int channel_quads = (t.channels + 3) / 4, planes = t.bytes ? 1 : 3;
    const float base = float(t.base);
    const double step = 1.0 / t.base;
    double square = 0;
    for (int c4 = 0; c4 < channel_quads; ++c4) {
        unsigned packed[3] = {0, 0, 0};
        for (int c = 4 * c4; c < at_most(4 * c4 + 4, t.channels); ++c) {
            const int64_t at = (from * t.channels + c) * plane + pixel;
            float value;
            int digits[3] = {0, 0, 0};
            if (t.bytes) {
                const int u = static_cast<const uint8_t*>(t.raw)[at];
                value = float(u) / 127.5f - 1.f;
                digits[0] = u - 128;
            } else {
                value = static_cast<const float*>(t.raw)[at];
                float rest = value * 127.5f - 0.5f;
                for (int d = 0; d < 3; ++d) {
                    const int digit = int(rintf(rest));
                    digits[d] = at_most(at_least(digit, d ? -127 : -128), 127);
                    rest = (rest - float(digits[d])) * base;
                }
            }
            const double whole = digits[0] + step * (digits[1] + step * digits[2]);
            square += whole * whole;
            for (int d = 0; d < planes; ++d) packed[d] |= unsigned(digits[d] & 255) << (8 * (c % 4));
            if (c >= t.first_value && c < t.first_value + t.values_per_pixel)
                t.values[x * (t.values_per_pixel > 1 ? 4 : 1) + c - t.first_value] = value;
        }
        for (int d = 0; d < planes; ++d) t.quads[((image * planes + d) * channel_quads + c4) * plane + pixel] = int(packed[d]);
    }
    t.squares[x] = square;
}

// |p|^2 of every k x k window, zeros lying beyond the border, from squared pixels: rows first, then columns. Sums are
// exact in double, so running sums, which subtract the pixels that leave, are exact too. ctypes mirrors it.
struct Norms {
    int height, width, images, patch_size;
    double unit;                // of the norms
    const double* squares;      // [images][height][width]
    double* columns;            // the same size: sums over k rows
    int* norms;                 // the same size
    float* fractions;           // what rounding left out, or null
};

__global__ void __launch_bounds__(THREADS) column_kernel(const Norms t) {
    const int64_t x = int64_t(blockIdx.x) * THREADS + threadIdx.x, plane = int64_t(t.height) * t.width;
    if (x >= int64_t(t.images) * t.width) return;
    const int r = t.patch_size / 2;
    const double* from = t.squares + x / t.width * plane + x % t.width;
    double* to = t.columns + x / t.width * plane + x % t.width;
    double sum = 0;
    for (int y = 0; y < at_most(r, t.height); ++y) sum += from[int64_t(y) * t.width];
    for (int y = 0; y < t.height; ++y) {
        if (y + r < t.height) sum += from[int64_t(y + r) * t.width];
        if (y - r - 1 >= 0) sum -= from[int64_t(y - r - 1) * t.width];
        to[int64_t(y) * t.width] = sum;
    }
}

__global__ void __launch_bounds__(THREADS) row_kernel(const Norms t) {
    const int64_t x = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (x >= int64_t(t.images) * t.height) return;
    const int r = t.patch_size / 2;
    const double* from = t.columns + x * t.width;
    double sum = 0;
    for (int b = 0; b < at_most(r, t.width); ++b) sum += from[b];
    for (int b = 0; b < t.width; ++b) {
        if (b + r < t.width) sum += from[b + r];
        if (b - r - 1 >= 0) sum -= from[b - r - 1];
        const double whole = rint(sum / t.unit);
        t.norms[x * t.width + b] = int(whole);
        if (t.fractions) t.fractions[x * t.width + b] = float(sum / t.unit - whole);
    }
}

// Whole images. Every noisy image meets every training image once, so q.p is one matrix product, of bytes as above, and
// |q - p|^2 exact. Bytes are read from the bank in place.
constexpr int STEP = 64;                    // values that a product of a warp takes at a time, 16 a lane
constexpr int AVERAGED = 8;                 // noisy images that share a training pixel once it is loaded
constexpr int ADDED = 256;                  // images that are added up in float32

// The digits of noisy images times training bytes. ctypes mirrors it.
struct Products {
    int images, values;         // values: of an image
    int groups, slice;          // groups of QUERIES noisy images; values of a block, few enough for sums to fit an int
    int digits_of_floats;       // 1: bytes are signed digits; 0: they are pixels u, used as u - 128
    const uint8_t* bytes;       // [.., values]
    const int64_t* indices;     // [images] positions in `bytes`, or null
    const int8_t* digits;       // [groups][3][QUERIES][values, rounded up to STEP]
    int* products;              // [slices][images][groups][3][QUERIES]
    int* norms;                 // [slices][images][4]: sums of squares of the bytes
};

// 16 bytes of an image from `at` on, signed; 0 beyond its end. Addresses are those of ints where ALIGNED.
template <bool ALIGNED>
__device__ __forceinline__ int4 sixteen(const Products& t, const uint8_t* image, int at) {
    if (at >= t.values) return {0, 0, 0, 0};
    const int sign = t.digits_of_floats ? 0 : 0x80;
    if constexpr (ALIGNED) {
        const int4 four = *reinterpret_cast<const int4*>(image + at);
        const int signs = int(unsigned(sign) * 0x01010101u);
        return {four.x ^ signs, four.y ^ signs, four.z ^ signs, four.w ^ signs};
    } else {
        int words[4] = {0, 0, 0, 0};
        for (int i = 0; i < at_most(16, t.values - at); ++i) words[i / 4] |= (image[at + i] ^ sign) << (8 * (i % 4));
        return {words[0], words[1], words[2], words[3]};
    }
}

// A warp holds TILES x TILE training images. The order of values does not matter to a sum, so a lane takes 16 adjacent
// ones, of training and noisy images alike.
template <bool ALIGNED>
__global__ void __launch_bounds__(THREADS) products_kernel(const Products t) {
    const int lane = threadIdx.x & 31, row = lane >> 2, quad = lane & 3;
    const int group = int(blockIdx.x) % t.groups;  // groups of the same images side by side, to read them from memory once
    const int first = (int(blockIdx.x) / t.groups * WARPS + int(threadIdx.x >> 5)) * TILES * TILE;
    if (first >= t.images) return;
    const int from = int(blockIdx.z) * t.slice, to = at_most(from + t.slice, t.values);
    const int64_t padded = (int64_t(t.values) + STEP - 1) / STEP * STEP;
    const int8_t* const digits = t.digits + (int64_t(group) * 3 * QUERIES + row) * padded + 16 * quad;
    const uint8_t* images[TILES];
    int products[3][TILES][4], norms[TILES];
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
        const int image = at_most(first + n * TILE + row, t.images - 1);
        images[n] = t.bytes + (t.indices ? t.indices[image] : image) * int64_t(t.values);
        norms[n] = 0;
#pragma unroll
        for (int digit = 0; digit < 3; ++digit)
            for (int x = 0; x < 4; ++x) products[digit][n][x] = 0;
    }
    for (int x = from; x < to; x += STEP) {
        int4 p[TILES];
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            p[n] = sixteen<ALIGNED>(t, images[n], x + 16 * quad);
            norms[n] = dot4(p[n].x, p[n].x, dot4(p[n].y, p[n].y, norms[n]));
            norms[n] = dot4(p[n].z, p[n].z, dot4(p[n].w, p[n].w, norms[n]));
        }
#pragma unroll
        for (int digit = 0; digit < 3; ++digit) {
            const int8_t* const at = digits + digit * QUERIES * padded + x;
            const int4 upper = *reinterpret_cast<const int4*>(at);
            const int4 lower = *reinterpret_cast<const int4*>(at + 8 * padded);
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                multiply(products[digit][n], upper.x, lower.x, upper.y, lower.y, p[n].x, p[n].y);
                multiply(products[digit][n], upper.z, lower.z, upper.w, lower.w, p[n].z, p[n].w);
            }
        }
    }
    const int64_t of_slice = int64_t(blockIdx.z) * t.images;
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
        if (group == 0 && first + n * TILE + row < t.images)
            t.norms[(of_slice + first + n * TILE + row) * 4 + quad] = norms[n];
#pragma unroll
        for (int x = 0; x < 4; ++x) {
            const int image = first + n * TILE + 2 * quad + x % 2, item = row + 8 * (x / 2);
            if (image < t.images)
                for (int digit = 0; digit < 3; ++digit)
                    t.products[(((of_slice + image) * t.groups + group) * 3 + digit) * QUERIES + item] =
                        products[digit][n][x];
        }
    }
}

// Sums of training images by weight. ctypes mirrors it.
struct Average {
    int images, values, groups, bytes;  // groups of AVERAGED noisy images; bytes as of Pack
    const void* raw;            // [.., values]
    const int64_t* indices;     // [images] positions in `raw`, or null
    const float* weights;       // [images][groups][AVERAGED]
    float* sums;                // [ADDED images each][groups][AVERAGED][values]
};

__host__ __device__ inline int value_blocks(const Average& t, int count) {
    return (t.values + count * THREADS - 1) / (count * THREADS);
}

__device__ __forceinline__ float value_of(unsigned byte) { return float(byte) * (1.f / 127.5f) - 1.f; }

// COUNT values, 4 of them in one aligned word or a single one.
template <int COUNT>
__device__ __forceinline__ void read_values(float (&values)[COUNT], const uint8_t* raw) {
    if constexpr (COUNT == 1) {
        values[0] = value_of(*raw);
    } else {
        const unsigned word = *reinterpret_cast<const unsigned*>(raw);
#pragma unroll
        for (int x = 0; x < COUNT; ++x) values[x] = value_of(word >> (8 * x) & 255);
    }
}

template <int COUNT>
__device__ __forceinline__ void read_values(float (&values)[COUNT], const float* raw) {
    if constexpr (COUNT == 1) {
        values[0] = *raw;
    } else {
        const float4 four = *reinterpret_cast<const float4*>(raw);
        const float all[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int x = 0; x < COUNT; ++x) values[x] = all[x];
    }
}

// A thread adds up COUNT neighbouring values of ADDED images for AVERAGED noisy ones.
template <typename Raw, int COUNT>
__global__ void __launch_bounds__(THREADS) average_kernel(const Average t) {
    // Groups of the same values run side by side, so that memory is read once.
    const int blocks = value_blocks(t, COUNT), group = int(blockIdx.x) % t.groups;
    const int x = (int(blockIdx.x) / t.groups % blocks * THREADS + int(threadIdx.x)) * COUNT;
    const int part = int(blockIdx.x) / t.groups / blocks;
    if (x >= t.values) return;
    const Raw* const raw = static_cast<const Raw*>(t.raw) + x;
    float sums[AVERAGED][COUNT];
#pragma unroll
    for (int item = 0; item < AVERAGED; ++item)
        for (int i = 0; i < COUNT; ++i) sums[item][i] = 0.f;
    const int first = part * ADDED, last = at_most(first + ADDED, t.images);
    for (int image = first; image < last; ++image) {
        const float4* const w = reinterpret_cast<const float4*>(t.weights + (int64_t(image) * t.groups + group) * AVERAGED);
        const float4 a = w[0], b = w[1];
        if (a.x + a.y + a.z + a.w + b.x + b.y + b.z + b.w == 0.f) continue;  // true of most images at low noise
        const float weights[AVERAGED] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        float values[COUNT];
        read_values(values, raw + (t.indices ? t.indices[image] : image) * int64_t(t.values));
#pragma unroll
        for (int item = 0; item < AVERAGED; ++item)
#pragma unroll
            for (int i = 0; i < COUNT; ++i) sums[item][i] += weights[item] * values[i];
    }
    float* const to = t.sums + (int64_t(part) * t.groups + group) * AVERAGED * t.values + x;
#pragma unroll
    for (int item = 0; item < AVERAGED; ++item)
#pragma unroll
        for (int i = 0; i < COUNT; ++i) to[int64_t(item) * t.values + i] = sums[item][i];
}

// Products with the Jacobian of the posterior mean, and sums of the posterior-mean windows that cover a pixel: a second
// pass, in which every window's weight is known. A warp takes one displacement between noisy and training image at a
// time: squared differences of pixels, their box sums (distances), weights, and for J^T u the box sums of the windows'
// contributions, along the same diagonal. ctypes mirrors it.
struct Jacobian {
    int kind;                   // see below
    int channels, height, width, patch_size, circular;
    Axis rows, cols;
    int images, items;
    int images_per_worker, parts;  // a warp takes so many images, and one of `parts` shares of the displacements
    int workers;                // warps of a block that work
    const float* noisy;         // [items][channels][height][width]
    const float* training;      // [images][channels][height][width]
    const float* direction;     // [items][channels][height][width], u or t
    const float* evidence;      // [items][height][width] a squared distance: w = 2^((evidence - distance) scale), sum 1
    const float* mean;          // [items][channels][height][width]
    const float* scale;         // [items]
    float* sums;                // [warps][items][channels][height][width]: a warp's addend, to be divided by sigma^2
};

enum Kind {
    FORWARD,   // J t:   sum_d w (x - D) Box[t.(x - z)]
    BACKWARD,  // J^T u: sum_d (x - z) Box[w u.(x - D)], where z only saves digits
    AVERAGING  // windows: sum_d x Box[w]
};

constexpr float LEAST_WEIGHT = 0x1p-60f;  // a displacement whose windows all weigh less is skipped

// A warp's part of shared memory: distances or contributions of windows; t.(x - z); partial box sums.
constexpr int PLANES_OF_WARP = 3;

__host__ __device__ inline int plane_floats(const Jacobian& t) { return t.height * (t.width | 1); }  // odd: no conflicts

// Displacements window - query along an axis: how many, and the first.
__host__ __device__ inline int displacements(const Jacobian& t, const Axis& axis, int size) {
    return axis.locked ? 1 : t.circular ? size : axis.w1 - axis.w0 + axis.q1 - axis.q0 - 1;
}
__host__ __device__ inline int first_displacement(const Jacobian& t, const Axis& axis) {
    return axis.locked || t.circular ? 0 : axis.w0 - (axis.q1 - 1);
}

__device__ __forceinline__ bool competes(const Axis& axis, int query, int window) {
    if (query < axis.q0 || query >= axis.q1) return false;
    return axis.locked ? window == query : window >= axis.w0 && window < axis.w1;
}

// Sums of k neighbours along every line, zeros lying beyond its ends. A task is k sums: first the part of each up to
// the middle of the first window, summed backwards from there, then the part beyond it, summed forwards. Nothing is
// subtracted, so nothing cancels.
__device__ __forceinline__ void sum_lines(const float* from, float* to, int lines, int length, int line_stride,
                                          int stride, int k, int lane) {
    const int r = k / 2, tasks = lines * ((length + k - 1) / k);
#pragma unroll 1
    for (int task = lane; task < tasks; task += 32) {
        const int line = task % lines * line_stride, start = task / lines * k;
        float sum = 0.f;
#pragma unroll 1
        for (int x = start + k - 1; x >= start; --x) {
            if (x - r >= 0 && x - r < length) sum += from[line + (x - r) * stride];
            if (x < length) to[line + x * stride] = sum;
        }
        sum = 0.f;
#pragma unroll 1
        for (int x = start + 1; x < start + k && x < length; ++x) {
            if (x + r < length) sum += from[line + (x + r) * stride];
            to[line + x * stride] += sum;
        }
    }
    __syncwarp();
}

// Box sums of a plane, in place. All lanes have written it.
__device__ __forceinline__ void box_sums(float* plane, float* between, const Jacobian& t, int lane) {
    const int pitch = t.width | 1;
    sum_lines(plane, between, t.height, t.width, pitch, 1, t.patch_size, lane);
    sum_lines(between, plane, t.width, t.height, 1, pitch, t.patch_size, lane);
}

template <int KIND>
__global__ void __launch_bounds__(THREADS, 2) jacobian_kernel(const Jacobian t) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, item = blockIdx.z;
    if (warp >= t.workers) return;
    const int H = t.height, W = t.width, pixels = H * W, pitch = W | 1;
    const int64_t worker = int64_t(blockIdx.x) * t.workers + warp;
    const int part = int(worker % t.parts);
    const int64_t first = worker / t.parts * t.images_per_worker;
    const int last = int(first + t.images_per_worker < t.images ? first + t.images_per_worker : t.images);
    float* const plane = reinterpret_cast<float*>(shared_memory()) + warp * PLANES_OF_WARP * plane_floats(t);
    float* const products = plane + plane_floats(t);
    float* const between = products + plane_floats(t);
    const int64_t of_item = int64_t(item) * t.channels * pixels;
    const float *const z = t.noisy + of_item, *const direction = t.direction + of_item, *const mean = t.mean + of_item;
    const float* const evidence = t.evidence + int64_t(item) * pixels;
    const float scale = t.scale[item];
    // A noisy pixel's sums belong to one lane.
    float* const sums = t.sums + (worker * t.items + item) * t.channels * pixels;
#pragma unroll 1
    for (int i = 0; i < H; ++i)
        for (int j = lane; j < W; j += 32)
            for (int c = 0; c < t.channels; ++c) sums[c * pixels + i * W + j] = 0.f;

    const int across = displacements(t, t.cols, W), all = displacements(t, t.rows, H) * across;
#pragma unroll 1
    for (int64_t image = first; image < last; ++image) {
        const float* const x = t.training + image * t.channels * pixels;
#pragma unroll 1
        for (int d = part; d < all; d += t.parts) {
            const int down = first_displacement(t, t.rows) + d / across;
            const int right = first_displacement(t, t.cols) + d % across;
            // Squared distances of training pixels from the noisy pixels at this displacement.
#pragma unroll 1
            for (int y = 0; y < H; ++y)
                for (int col = lane; col < W; col += 32) {
                    int i = y - down, j = col - right;
                    if (t.circular) i += i < 0 ? H : 0, j += j < 0 ? W : 0;
                    const bool inside = i >= 0 && i < H && j >= 0 && j < W;
                    float square = 0.f, product = 0.f;
                    for (int c = 0; c < t.channels; ++c) {
                        const float p = x[c * pixels + y * W + col];
                        const float away = p - (inside ? z[c * pixels + i * W + j] : 0.f);
                        square += away * away;
                        if (KIND == FORWARD && inside) product += direction[c * pixels + i * W + j] * away;
                    }
                    plane[y * pitch + col] = square;
                    if (KIND == FORWARD) products[y * pitch + col] = product;
                }
            __syncwarp();
            box_sums(plane, between, t, lane);
            if (KIND == FORWARD) box_sums(products, between, t, lane);
            // Windows by their centres: weights and contributions.
            bool weighs = false;
#pragma unroll 1
            for (int y = 0; y < H; ++y)
                for (int col = lane; col < W; col += 32) {
                    int i = y - down, j = col - right;
                    if (t.circular) i += i < 0 ? H : 0, j += j < 0 ? W : 0;
                    float w = 0.f;
                    if (competes(t.rows, i, y) && competes(t.cols, j, col)) {
                        const int at = i * W + j;
                        w = power_of_two((evidence[at] - plane[y * pitch + col]) * scale);
                        weighs = weighs || w > LEAST_WEIGHT;
                        if (KIND == BACKWARD) {
                            float along = 0.f;
                            for (int c = 0; c < t.channels; ++c)
                                along += direction[c * pixels + at] * (x[c * pixels + y * W + col] - mean[c * pixels + at]);
                            w *= along;
                        }
                    }
                    plane[y * pitch + col] = w;
                }
            if (!any_lane(weighs)) continue;
            __syncwarp();
            if (KIND != FORWARD) box_sums(plane, between, t, lane);
#pragma unroll 1
            for (int i = 0; i < H; ++i)
                for (int j = lane; j < W; j += 32) {
                    int y = i + down, col = j + right;
                    if (t.circular) y -= y >= H ? H : 0, col -= col >= W ? W : 0;
                    if (y < 0 || y >= H || col < 0 || col >= W) continue;
                    float given = plane[y * pitch + col];
                    if (KIND == FORWARD) given *= products[y * pitch + col];
                    if (given == 0.f) continue;
                    for (int c = 0; c < t.channels; ++c) {
                        const int at = c * pixels + i * W + j;
                        const float from = KIND == FORWARD ? mean[at] : KIND == BACKWARD ? z[at] : 0.f;
                        sums[at] += given * (x[c * pixels + y * W + col] - from);
                    }
                }
            __syncwarp();
        }
    }
}

// The last error with the kernel's name, for Python to raise, or null. It is cleared, as the next call would report it
// again.
static const char* told(const char* kernel, cudaError_t error) {
    static thread_local char text[1024];
    if (error == cudaSuccess) return nullptr;
    std::snprintf(text, sizeof text, "%s: %s (%s)", kernel, cudaGetErrorString(error), cudaGetErrorName(error));
    cudaGetLastError();
    return text;
}

// Raises a kernel's limit of shared memory to all that a device allows, once for each device, rather than to what a
// launch needs: another thread's launch may need more.
template <typename Task>
static cudaError_t allow_shared(void (*kernel)(Task), int device) {
    static std::mutex lock;
    static std::set<std::pair<void (*)(Task), int>> allowed;
    const std::lock_guard<std::mutex> locked(lock);
    if (allowed.count({kernel, device})) return cudaSuccess;
    int most = 0;
    cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error == cudaSuccess) allowed.insert({kernel, device});
    return error;
}

// Starts `blocks` x `items` blocks of THREADS threads.
template <typename Task>
static cudaError_t launch(void (*kernel)(Task), int64_t blocks, int64_t items, int shared_bytes, int device, void* stream,
                          const Task& task) {
    if (blocks < 1 || blocks > INT32_MAX || items < 1 || items > 65535) return cudaErrorInvalidConfiguration;
    if (shared_bytes > 0) {
        const cudaError_t error = allow_shared(kernel, device);
        if (error != cudaSuccess) return error;
    }
    void* arguments[] = {const_cast<Task*>(&task)};
    return cudaLaunchKernel(kernel, dim3(unsigned(blocks), 1, unsigned(items)), dim3(THREADS), arguments,
                            size_t(shared_bytes), static_cast<cudaStream_t>(stream));
}

static int64_t blocks_for(int64_t threads) { return (threads + THREADS - 1) / THREADS; }

template <int PLANES, bool MOMENTS>
static cudaError_t launch_windows(const Windows& task, int64_t blocks, int device, void* stream) {
    const int bytes = layout_of(task).end;
    switch (task.values_per_pixel) {
        case 1: return launch(windows_kernel<PLANES, 1, MOMENTS>, blocks, task.items, bytes, device, stream, task);
        case 3: return launch(windows_kernel<PLANES, 3, MOMENTS>, blocks, task.items, bytes, device, stream, task);
        case 4: return launch(windows_kernel<PLANES, 4, MOMENTS>, blocks, task.items, bytes, device, stream, task);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace patchscore

using namespace patchscore;

#define PS_EXPORT extern "C" __attribute__((visibility("default")))

// Sizes of the structures ctypes mirrors: a build that does not fit the Python beside it is not used.
PS_EXPORT int64_t patchscore_layout() {
    int64_t layout = 0;
    for (const size_t size :
         {sizeof(Jacobian), sizeof(Average), sizeof(Products), sizeof(Norms), sizeof(Pack), sizeof(Windows)})
        layout = 1000 * layout + int64_t(size);
    return layout;
}

// Why no device can serve, or null.
PS_EXPORT const char* patchscore_unavailable() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
        cudaGetLastError();
        return cudaGetErrorString(error);
    }
    return count ? nullptr : "no CUDA device";
}

// Bytes of shared memory that a block takes, and that it may take on a device (0 if unknown).
PS_EXPORT int patchscore_shared_bytes(const Windows* task) { return layout_of(*task).end; }

PS_EXPORT int patchscore_shared_limit(int device) {
    int most = 0;
    if (cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess) return most;
    cudaGetLastError();
    return 0;
}

PS_EXPORT const char* patchscore_windows(const Windows* task, int device, void* stream) {
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess && (task->strip < 1 || task->groups_per_chunk < 1 || task->images < 1))
        error = cudaErrorInvalidValue;
    if (error == cudaSuccess) {
        const int columns = columns_of(task->cols, task->cols.q0);
        const int64_t groups = (int64_t(task->images) * ((columns + TILE - 1) / TILE) + TILES - 1) / TILES;
        const int64_t chunks = (groups + task->groups_per_chunk - 1) / task->groups_per_chunk;
        const int64_t blocks = chunks * row_blocks(*task) * column_blocks(*task);
        const auto launched = task->planes == 1 ? (task->moments ? launch_windows<1, true> : launch_windows<1, false>)
                                                : (task->moments ? launch_windows<3, true> : launch_windows<3, false>);
        error = launched(*task, blocks, device, stream);
    }
    return told("windows_kernel", error);
}

// `sums` has room for whole blocks of `workers` warps.
PS_EXPORT const char* patchscore_jacobian(const Jacobian* task, int device, void* stream) {
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess && (task->workers < 1 || task->workers > WARPS || task->parts < 1 || task->images_per_worker < 1))
        error = cudaErrorInvalidValue;
    if (error == cudaSuccess) {
        const int64_t chunks = (int64_t(task->images) + task->images_per_worker - 1) / task->images_per_worker;
        const int64_t blocks = (chunks * task->parts + task->workers - 1) / task->workers;
        const auto kernel = task->kind == FORWARD    ? jacobian_kernel<FORWARD>
                            : task->kind == BACKWARD ? jacobian_kernel<BACKWARD>
                                                     : jacobian_kernel<AVERAGING>;
        const int floats = task->workers * PLANES_OF_WARP * plane_floats(*task);
        error = launch(kernel, blocks, task->items, 4 * floats, device, stream, *task);
    }
    return told("jacobian_kernel", error);
}

PS_EXPORT const char* patchscore_pack(const Pack* task, int device, void* stream) {
    cudaError_t error = cudaSetDevice(device);
    const int64_t pixels = int64_t(task->images) * task->height * task->width;
    if (error == cudaSuccess) error = launch(pack_kernel, blocks_for(pixels), 1, 0, device, stream, *task);
    return told("pack_kernel", error);
}

PS_EXPORT const char* patchscore_norms(const Norms* task, int device, void* stream) {
    cudaError_t error = cudaSetDevice(device);
    const int64_t columns = int64_t(task->images) * task->width, rows = int64_t(task->images) * task->height;
    if (error == cudaSuccess) error = launch(column_kernel, blocks_for(columns), 1, 0, device, stream, *task);
    if (error != cudaSuccess) return told("column_kernel", error);
    error = launch(row_kernel, blocks_for(rows), 1, 0, device, stream, *task);
    return told("row_kernel", error);
}

PS_EXPORT const char* patchscore_products(const Products* task, int device, void* stream) {
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess && task->slice < 1) error = cudaErrorInvalidValue;
    if (error == cudaSuccess) {
        const bool aligned = task->values % 16 == 0 && reinterpret_cast<uintptr_t>(task->bytes) % 16 == 0;
        const int images = WARPS * TILES * TILE;
        const int64_t blocks = int64_t((task->images + images - 1) / images) * task->groups;
        const int slices = (task->values + task->slice - 1) / task->slice;
        error = launch(aligned ? products_kernel<true> : products_kernel<false>, blocks, slices, 0, device, stream, *task);
    }
    return told("products_kernel", error);
}

PS_EXPORT const char* patchscore_average(const Average* task, int device, void* stream) {
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess) {
        const bool aligned = task->values % 4 == 0 && reinterpret_cast<uintptr_t>(task->raw) % (task->bytes ? 4 : 16) == 0;
        const auto kernel = aligned ? (task->bytes ? average_kernel<uint8_t, 4> : average_kernel<float, 4>)
                                    : (task->bytes ? average_kernel<uint8_t, 1> : average_kernel<float, 1>);
        const int64_t parts = (task->images + ADDED - 1) / ADDED;
        error = launch(kernel, parts * value_blocks(*task, aligned ? 4 : 1) * task->groups, 1, 0, device, stream, *task);
    }
    return told("average_kernel", error);
}
