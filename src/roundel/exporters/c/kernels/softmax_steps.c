#include "requantize.c"
#include "reciprocal.c"
#include "exp_steps.c"

/* Softmax of 16-bit codes: exp of the difference from the largest by steps, 0 beyond reach. count codes lie step apart. */
struct softmax_steps {
    const int32_t *table;
    int32_t outer, count, step, bits, reach, multiplier, shift;
    struct codes to;
};

static int32_t term_R(const struct softmax_steps *a, int32_t far)
{
    return far <= a->reach ? exp_steps(a->table, rescale_R(far, a->multiplier, a->shift)) : 0;
}

static void softmax_steps_X_Y_R(const struct softmax_steps *a, const X *x, Y *y)
{
    for (int32_t i = 0; i < a->outer * a->step; i++) {
        const int32_t at = i / a->step * a->step * a->count + i % a->step;
        int32_t largest = x[at], multiplier, shift;
        uint32_t total = 0;
        for (int32_t j = 1; j < a->count; j++) {
            largest = x[at + j * a->step] > largest ? x[at + j * a->step] : largest;
        }
        for (int32_t j = 0; j < a->count; j++) {
            total += ((uint32_t)term_R(a, largest - x[at + j * a->step]) + 2048u) >> 12;
        }
        multiplier = reciprocal(total, &shift);
        shift += a->bits - 31;
        if (shift < -31) {
            multiplier = 0;
            shift = -31;
        }
        for (int32_t j = 0; j < a->count; j++) {
            y[at + j * a->step] = (Y)requantize_R(term_R(a, largest - x[at + j * a->step]), multiplier, shift, &a->to);
        }
    }
}
