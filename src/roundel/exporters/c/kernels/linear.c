#include "product.c"

/* Each of rows columns of codes by the weights; y may lie where x lies if it is not longer. */
struct linear {
    struct product product;
    int32_t rows, outputs;
};

static void linear_X_Y_R_W(const struct linear *a, const X *x, Y *y, void *scratch)
{
    const int32_t depth = a->product.depth;
    void *columns = (char *)scratch + a->product.lead;
#if DSP_S
    begin_W(&a->product, scratch);
#endif
    for (int32_t row = 0; row < a->rows; row += 2, y += 2 * a->outputs) {
        const int32_t count = row + 1 < a->rows ? 2 : 1;
        for (int32_t i = 0; i < count; i++, x += depth) {
            put_X_S(column_at_X_S(&a->product, columns, i), 0, x, depth);
        }
        product_X_Y_R_W(&a->product, 0, a->outputs, columns, count, y, a->outputs);
    }
}
