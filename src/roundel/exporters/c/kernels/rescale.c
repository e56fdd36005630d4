#include "requantize.c"

/* The same numbers in other units, clamped. */
struct rescale {
    int32_t count, x_zero, multiplier, shift;
    struct codes to;
};

static void rescale_X_Y_R(const struct rescale *a, const X *x, Y *y)
{
    for (int32_t i = 0; i < a->count; i++) {
        y[i] = (Y)requantize_R(x[i] - a->x_zero, a->multiplier, a->shift, &a->to);
    }
}
