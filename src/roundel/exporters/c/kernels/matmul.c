#include "requantize.c"

/* Products of matrices, one for each place of the n leading loops. Steps are from one matrix, row and column to the next. */
struct matmul {
    int32_t n[2], a_head[2], b_head[2], y_head[2];
    int32_t rows, depth, columns, a_row, a_column, b_row, b_column, y_row, y_column;
    int32_t a_zero, b_zero, multiplier, shift;
    struct codes to;
};

static void matmul_X_Z_Y_R(const struct matmul *p, const X *a, const Z *b, Y *y)
{
    for (int32_t head = 0; head < p->n[0] * p->n[1]; head++) {
        const int32_t i = head / p->n[1], j = head % p->n[1];
        for (int32_t row = 0; row < p->rows; row++) {
            const X *one = a + i * p->a_head[0] + j * p->a_head[1] + row * p->a_row;
            Y *to = y + i * p->y_head[0] + j * p->y_head[1] + row * p->y_row;
            for (int32_t column = 0; column < p->columns; column++) {
                const Z *other = b + i * p->b_head[0] + j * p->b_head[1] + column * p->b_column;
                S sum = 0;
                for (int32_t k = 0; k < p->depth; k++) {
                    sum += (S)(one[k * p->a_column] - p->a_zero) * (other[k * p->b_row] - p->b_zero);
                }
                to[column * p->y_column] = (Y)requantize_R(sum, p->multiplier, p->shift, &p->to);
            }
        }
    }
}
