static void check_vectors() {
    Real x[LANES], y[LANES], z[LANES], got[LANES];
    for (int round = 0; round < 200; ++round) {
        for (int i = 0; i < LANES; ++i) {
            x[i] = Real(std::sin(1.3 * (i + 1) + round)), y[i] = Real(std::cos(0.7 * i + 2 * round));
            z[i] = Real(i % 3) - 1;
        }
        if (round == 0) y[0] = x[0];
        const F a = load(x), b = load(y), c = load(z);
        unsigned bits = 0;
        for (int i = 0; i < LANES; ++i) bits |= unsigned(x[i] > y[i]) << i;
        REQUIRE(above(a, b) == bits && any_above(a, b) == (bits != 0));
        REQUIRE(!any_above(a, a) && above(a, a) == 0);
        store(got, maximum(a, b));
        for (int i = 0; i < LANES; ++i) REQUIRE(got[i] == (x[i] > y[i] ? x[i] : y[i]));
        store(got, minimum(a, b));
        for (int i = 0; i < LANES; ++i) REQUIRE(got[i] == (x[i] < y[i] ? x[i] : y[i]));
        store(got, fma(a, b, c));
        for (int i = 0; i < LANES; ++i)
            REQUIRE(std::abs(double(got[i]) - (double(x[i]) * double(y[i]) + double(z[i]))) < 2e-7);
        store(got, broadcast(x[0]));
        for (int i = 0; i < LANES; ++i) REQUIRE(got[i] == x[0]);
        // 2^x from tiny to huge weights.
        for (int i = 0; i < LANES; ++i) x[i] *= Real(round < 100 ? 1 : 120);
        store(got, exp2(load(x)));
        for (int i = 0; i < LANES; ++i) REQUIRE(std::abs(double(got[i]) / std::exp2(double(x[i])) - 1) < 2.7e-6);
        F many[3] = {load(x), load(x) * Real(2), load(x) * Real(0.5)};
        exp2_scaled(many, many, broadcast(Real(0.25)), broadcast(Real(-400)));
        store(got, many[1]);
        for (int i = 0; i < LANES; ++i) REQUIRE(std::abs(double(got[i]) / std::exp2(double(x[i]) / 2) - 1) < 2.7e-6);
    }
    // Weights far below are nothing: at most 2^lowest.
    store(got, exp2(broadcast(Real(-1e30))));
    for (int i = 0; i < LANES; ++i) REQUIRE(got[i] >= 0 && got[i] < Real(1.2e-38));
}
