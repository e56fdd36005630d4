/* 1 / sqrt(v), for 1 <= v < 2^62, as multiplier * 2^(shift - 31): four Newton steps y (3 - m y^2) / 2, m in [1/4, 1). */
static int32_t reciprocal_root(int64_t v, int32_t *shift)
{
    int32_t even = 0;
    int64_t m, y;
    while (even < 62 && v >> even > 0) {
        even += 2;
    }
    m = even > 31 ? v >> (even - 31) : v * ((int64_t)1 << (31 - even));
    y = 1152661848 - ((m * 658740609) >> 31);
    for (int32_t i = 0; i < 4; i++) {
        y = (y * (1610612736 - ((m * ((y * y) >> 29)) >> 31))) >> 30;
    }
    *shift = 1 - even / 2;
    return y >= 1 << 30 ? 2147483647 : (int32_t)(2 * y);
}
