#include "requantize.c"
#include "reciprocal_root.c"

/* Layer norm, or RMS norm where not centred, over rows of count codes; 1 / sqrt in units of 2^-bits. */
struct norm {
    const int32_t *weight;
    const void *bias; /* int32_t, or int64_t where sums are */
    int64_t eps;
    int32_t rows, count, centred, bits, x_zero, multiplier, shift;
    struct codes to;
};

static void norm_X_Y_R(const struct norm *a, const X *x, Y *y)
{
    for (int32_t row = 0; row < a->rows; row++, x += a->count, y += a->count) {
        int64_t squares = 0, spread;
        int32_t total = 0, factor, shift;
        for (int32_t i = 0; i < a->count; i++) {
            const int32_t number = x[i] - a->x_zero;
            total += number;
            squares += (int64_t)number * number;
        }
        total = a->centred ? total : 0;
        spread = a->count * squares - (int64_t)total * total + a->eps;
        factor = reciprocal_root(spread > 1 ? spread : 1, &shift);
        for (int32_t i = 0; i < a->count; i++) {
            const int32_t unit = (int32_t)rescale_R(a->count * (x[i] - a->x_zero) - total, factor, shift + a->bits);
            y[i] = (Y)requantize_R((S)unit * a->weight[i] + ((const S *)a->bias)[i], a->multiplier, a->shift, &a->to);
        }
    }
}
