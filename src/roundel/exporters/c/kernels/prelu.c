#include "requantize.c"

/* Other units for positive numbers, and for negative ones of each channel; count channels lie step apart. */
struct prelu {
    const int32_t *multiplier;
    const int8_t *shift;
    int32_t outer, count, step, x_zero;
    struct codes to;
};

static void prelu_X_Y_R(const struct prelu *a, const X *x, Y *y)
{
    for (int32_t i = 0; i < a->outer; i++) {
        for (int32_t c = 0; c < a->count; c++) {
            for (int32_t j = 0; j < a->step; j++) {
                const int32_t number = *x++ - a->x_zero, side = number < 0 ? a->count + c : c;
                *y++ = (Y)requantize_R(number, a->multiplier[side], a->shift[side], &a->to);
            }
        }
    }
}
