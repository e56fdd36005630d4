#include "multiply_high.c"

/* 1 / total, for totals in Q12.19 of 1 and more, as multiplier * 2^(shift - 31): three Newton steps from 48/17 - 32/17 d. */
static int32_t reciprocal(uint32_t total, int32_t *shift)
{
    int32_t spare = 0, half, x;
    while (!(total & 0x80000000u)) {
        total <<= 1;
        spare++;
    }
    half = (int32_t)(total >> 1);
    x = 1515870810 + multiply_high(half, -1010580540);
    for (int32_t i = 0; i < 3; i++) {
        x += multiply_high(x, (1 << 29) - multiply_high(half, x)) * 4;
    }
    *shift = spare - 12;
    return x >= 1 << 30 ? 2147483647 : 2 * x;
}
