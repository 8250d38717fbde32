// The vector type of the kernels: LANES numbers F of type Real, their integers I and U, and a few operations.
//
// Included per level (PS_LEVEL, each-level-inl.h) and per element type: PS_DOUBLE defined makes Real double. PS_LANES,
// if defined, asks for more lanes than a register has; the compiler then splits a vector into registers. Arithmetic,
// comparisons and selection are the compiler's vector extension: a + b, a > b (an I of 0 or -1), mask ? a : b.

#if defined(PS_DOUBLE)
using Real = double;
using Integer = int64_t;
using Unsigned = uint64_t;
#define PS_REAL_BITS 64
#define PS_SUFFIX pd
#else
using Real = float;
using Integer = int32_t;
using Unsigned = uint32_t;
#define PS_REAL_BITS 32
#define PS_SUFFIX ps
#endif

#if !defined(PS_LANES)
#define PS_LANES (PS_LEVEL / PS_REAL_BITS)
#endif
constexpr int LANES = PS_LANES;
constexpr size_t VECTOR_BYTES = LANES * sizeof(Real);
// The alignment is named since GCC's own depends on the level, and what holds vectors is to be laid out alike.
typedef Real F __attribute__((vector_size(VECTOR_BYTES), aligned(VECTOR_BYTES)));
typedef Integer I __attribute__((vector_size(VECTOR_BYTES), aligned(VECTOR_BYTES)));
typedef Unsigned U __attribute__((vector_size(VECTOR_BYTES), aligned(VECTOR_BYTES)));

typedef Real Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(Real)), may_alias));

// Bits of a vector that is one register: instructions that the vector extension has no name for.
#if PS_LANES * PS_REAL_BITS > PS_LEVEL || PS_LANES * PS_REAL_BITS < 256
#define PS_REGISTER 0
#else
#define PS_REGISTER (PS_LANES * PS_REAL_BITS)
#endif
#define PS_JOIN_(prefix, name, suffix) prefix##name##_##suffix
#define PS_JOIN(prefix, name, suffix) PS_JOIN_(prefix, name, suffix)
#define PS_512(name) PS_JOIN(_mm512_, name, PS_SUFFIX)
#define PS_256(name) PS_JOIN(_mm256_, name, PS_SUFFIX)

// Not memcpy, which compilers may split into halves that pass through memory.
PS_INLINE F load(const Real* at) { return *(const Unaligned*)at; }
PS_INLINE void store(Real* at, F x) { *(Unaligned*)at = x; }

PS_INLINE F broadcast(Real x) {
#if PS_REGISTER == 512
    return F(PS_512(set1)(x));
#elif PS_REGISTER == 256
    return F(PS_256(set1)(x));
#else
    return x - F{};
#endif
}

// a b + c, in one instruction where the level has one.
PS_INLINE F fma(F a, F b, F c) {
#if PS_REGISTER == 512
    return F(PS_512(fmadd)(a, b, c));
#elif PS_REGISTER == 256
    return F(PS_256(fmadd)(a, b, c));
#else
    return a * b + c;
#endif
}

PS_INLINE F maximum(F a, F b) {
#if PS_REGISTER == 512
    return F(PS_512(max)(a, b));
#elif PS_REGISTER == 256
    return F(PS_256(max)(a, b));
#else
    return a > b ? a : b;
#endif
}

PS_INLINE F minimum(F a, F b) {
#if PS_REGISTER == 512
    return F(PS_512(min)(a, b));
#elif PS_REGISTER == 256
    return F(PS_256(min)(a, b));
#else
    return a < b ? a : b;
#endif
}

// Bit i: whether a > b in lane i.
PS_INLINE unsigned above(F a, F b) {
#if PS_REGISTER == 512 && defined(PS_DOUBLE)
    return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ);
#elif PS_REGISTER == 512
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
#elif PS_REGISTER == 256
    return unsigned(PS_256(movemask)(PS_256(cmp)(a, b, _CMP_GT_OQ)));
#else
    const I mask = a > b;
    unsigned bits = 0;
    for (int i = 0; i < LANES; ++i) bits |= unsigned(mask[i] & 1) << i;
    return bits;
#endif
}

// Whether any lane of a comparison holds.
PS_INLINE bool any(I mask) {
#if PS_REGISTER == 256
    return PS_256(movemask)(F(mask)) != 0;
#else
    Integer all = 0;
    for (int i = 0; i < LANES; ++i) all |= mask[i];
    return all != 0;
#endif
}

PS_INLINE bool any_above(F a, F b) {
#if PS_REGISTER
    return above(a, b) != 0;
#else
    return any(a > b);
#endif
}

// y = 2^(max(x, lowest) scale), to 2.6e-6 of itself, for results that are normal numbers. The definition is std::exp2;
// tests/sanitize/common.cpp holds the two together. With n an integer and l = x scale = n + f, 2^f is a polynomial
// (minimax, degree 4) and n goes into the exponent.
template <int COUNT>
PS_INLINE void exp2_scaled(F (&y)[COUNT], const F (&x)[COUNT], F scale, F lowest) {
#if PS_REGISTER == 512
    // n = floor(l), by hardware: scalef multiplies by 2^floor(l), and gives 0 where that is too small to be a number.
    constexpr Real C[] = {Real(1.000002593e+00), Real(6.930038345e-01), Real(2.414427569e-01), Real(5.201146061e-02),
                          Real(1.353416792e-02)};
    constexpr int FRACTION = 9;  // reduce: x - floor(x)
    F f[COUNT], l[COUNT];
    (void)lowest;
    PS_EACH(COUNT) l[i] = x[i] * scale;
    PS_EACH(COUNT) f[i] = F(PS_512(reduce)(l[i], FRACTION));
    PS_EACH(COUNT) y[i] = fma(broadcast(C[4]), f[i], broadcast(C[3]));
    for (int power = 2; power >= 0; --power) PS_EACH(COUNT) y[i] = fma(y[i], f[i], broadcast(C[power]));
    PS_EACH(COUNT) y[i] = F(PS_512(scalef)(y[i], l[i]));
#else
    // n = the nearest integer, found by adding a number so large that no fraction is left; its last bits are then n.
    constexpr Real C[] = {Real(9.999992614e-01), Real(6.931218147e-01), Real(2.402474483e-01), Real(5.591786032e-02),
                          Real(9.570101911e-03)};
    constexpr int MANTISSA = sizeof(Real) == 4 ? 23 : 52;
    constexpr Real ROUND = Real(1.5) * Real(int64_t(1) << MANTISSA);
    F l[COUNT], t[COUNT], f[COUNT];
    PS_EACH(COUNT) l[i] = maximum(x[i], lowest);
    PS_EACH(COUNT) t[i] = fma(l[i], scale, broadcast(ROUND));
    PS_EACH(COUNT) f[i] = fma(l[i], scale, broadcast(ROUND) - t[i]);
    PS_EACH(COUNT) y[i] = fma(broadcast(C[4]), f[i], broadcast(C[3]));
    for (int power = 2; power >= 0; --power) PS_EACH(COUNT) y[i] = fma(y[i], f[i], broadcast(C[power]));
    PS_EACH(COUNT) y[i] = F(U(y[i]) + (U(t[i]) << MANTISSA));
#endif
}

PS_INLINE F exp2(F x) {
    constexpr Real LOWEST = sizeof(Real) == 4 ? -126 : -1022;
    F each[1] = {x};
    exp2_scaled(each, each, broadcast(1), broadcast(LOWEST));
    return each[0];
}

#undef PS_REGISTER
#undef PS_JOIN_
#undef PS_JOIN
#undef PS_512
#undef PS_256
#undef PS_SUFFIX
#undef PS_REAL_BITS
#undef PS_LANES
#undef PS_DOUBLE
