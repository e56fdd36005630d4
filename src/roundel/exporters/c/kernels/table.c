/* Any function of one code, by look-up; first is the smallest code. */
struct table {
    const Y *table;
    int32_t count, first;
};

static void table_X_Y(const struct table *a, const X *x, Y *y)
{
    for (int32_t i = 0; i < a->count; i++) {
        y[i] = a->table[x[i] - a->first];
    }
}
