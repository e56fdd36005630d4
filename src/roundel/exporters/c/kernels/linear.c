#include "product.c"

/* Each of rows columns of codes by the weights; y may lie where x lies if it is not longer. */
struct linear {
    struct product product;
    int32_t rows, outputs;
};

static void linear_X_Y_R_W(const struct linear *a, const X *x, Y *y, void *scratch)
{
    const int32_t depth = a->product.depth, columns = a->product.columns;
    for (int32_t row = 0; row < a->rows; row += columns, y += columns * a->outputs) {
        const int32_t count = a->rows - row < columns ? a->rows - row : columns;
        for (int32_t i = 0; i < count; i++, x += depth) {
            put_X_S(&a->product, column_at_X_S(&a->product, scratch, i), 0, x, depth);
        }
        product_X_Y_R_W(&a->product, 0, a->outputs, scratch, count, y, a->outputs);
    }
}
