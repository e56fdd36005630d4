#include "requantize.c"

/* Rows and columns, channels last, each by an index and the weight of its next neighbour in units of 2^-bits. */
struct resize {
    const int32_t *rows, *columns;
    int32_t height, width, channels, out_height, out_width, bits, x_zero, multiplier, shift;
    struct codes to;
};

static void resize_X_Y_R(const struct resize *a, const X *x, Y *y)
{
    const int32_t one = (int32_t)1 << a->bits;
    for (int32_t i = 0; i < a->out_height; i++) {
        const int32_t top = a->rows[2 * i], down = a->rows[2 * i + 1], below = top + 1 < a->height ? top + 1 : top;
        for (int32_t j = 0; j < a->out_width; j++) {
            const int32_t left = a->columns[2 * j], across = a->columns[2 * j + 1], right = left + 1 < a->width ? left + 1 : left;
            const X *near = x + (top * a->width + left) * a->channels, *beside = x + (top * a->width + right) * a->channels;
            const X *under = x + (below * a->width + left) * a->channels, *corner = x + (below * a->width + right) * a->channels;
            for (int32_t c = 0; c < a->channels; c++) {
                const int32_t first = (near[c] - a->x_zero) * (one - down) + (under[c] - a->x_zero) * down;
                const int32_t second = (beside[c] - a->x_zero) * (one - down) + (corner[c] - a->x_zero) * down;
                *y++ = (Y)requantize_R(first * (one - across) + second * across, a->multiplier, a->shift, &a->to);
            }
        }
    }
}
