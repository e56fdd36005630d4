#include "requantize.c"
#include "reciprocal.c"

/* table[d] is exp(-d * scale) in Q0.31, d being the difference from the largest code of count, which lie step apart. */
struct softmax {
    const int32_t *table;
    int32_t outer, count, step, bits;
    struct codes to;
};

static void softmax_X_Y_R(const struct softmax *a, const X *x, Y *y)
{
    for (int32_t i = 0; i < a->outer * a->step; i++) {
        const int32_t at = i / a->step * a->step * a->count + i % a->step;
        int32_t largest = x[at], multiplier, shift;
        uint32_t total = 0;
        for (int32_t j = 1; j < a->count; j++) {
            largest = x[at + j * a->step] > largest ? x[at + j * a->step] : largest;
        }
        for (int32_t j = 0; j < a->count; j++) {
            total += ((uint32_t)a->table[largest - x[at + j * a->step]] + 2048u) >> 12;
        }
        multiplier = reciprocal(total, &shift);
        shift += a->bits - 31;
        if (shift < -31) {
            multiplier = 0;
            shift = -31;
        }
        for (int32_t j = 0; j < a->count; j++) {
            const int32_t term = a->table[largest - x[at + j * a->step]];
            y[at + j * a->step] = (Y)requantize_R(term, multiplier, shift, &a->to);
        }
    }
}
