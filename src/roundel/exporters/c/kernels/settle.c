/* Biases and shifts of a weighted layer under the exponents of the sites that it reads and makes, x and y, -1 where there is none;
 * zeros is the part of the bias that is in codes. */
struct settle {
    const int32_t *bias, *zeros;
    const int8_t *shift;
    int32_t *bias_now;
    int8_t *shift_now;
    int32_t outputs, x, y;
};

static void settle(const struct settle *a)
{
    const int32_t in = used_at(a->x), by = in - used_at(a->y);
    for (int32_t o = 0; o < a->outputs; o++) {
        const int32_t bias = in > 0 ? (a->bias[o] + (1 << (in - 1))) >> in : a->bias[o] * (1 << -in);
        a->bias_now[o] = bias - a->zeros[o];
        a->shift_now[o] = (int8_t)bounded(a->shift[o] + by);
    }
}
