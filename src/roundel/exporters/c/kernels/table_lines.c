/* Any function of one 16-bit code: an entry for every 2^bits codes and one more, a line between entries; first is the smallest code. */
struct table_lines {
    const Y *table;
    int32_t count, first, bits;
};

static void table_lines_X_Y(const struct table_lines *a, const X *x, Y *y)
{
    const int32_t half = ((int32_t)1 << a->bits) >> 1;
    for (int32_t i = 0; i < a->count; i++) {
        const int32_t at = (x[i] - a->first) >> a->bits, part = (x[i] - a->first) & (((int32_t)1 << a->bits) - 1);
        const int32_t from = a->table[at], rise = a->table[at + 1] - from;
        y[i] = (Y)(from + ((rise * part + half) >> a->bits));
    }
}
