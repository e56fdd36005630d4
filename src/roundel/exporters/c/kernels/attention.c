#include "requantize.c"
#include "reciprocal.c"
#include "exp_steps.c"

/* softmax(q k^T) v for every head, a head being one place of the n leading loops. Steps are from one head, row and column to the
 * next. table holds exp in Q0.31 in three steps of 7 bits; keep, where it is, is 0 for a key that a query does not see. */
struct attention {
    const int32_t *table;
    const int8_t *keep;
    int64_t reach;
    int32_t n[2], q_head[2], k_head[2], v_head[2], y_head[2];
    int32_t queries, keys, depth, outputs, q_row, q_column, k_row, k_column, v_row, v_column, y_row, y_column;
    int32_t q_zero, k_zero, v_zero, causal, multiplier[2], shift[2], bits;
    struct codes to;
};

/* Shares of one query, summing to about 2^bits, into part. */
static void shares_X_Z_R(const struct attention *a, const X *q, const Z *k, int32_t query, S *part)
{
    const struct codes whole = {0, 0, (int32_t)(((uint32_t)1 << a->bits) - 1u)};
    const int32_t keys = a->causal && query + 1 < a->keys ? query + 1 : a->keys;
    S largest = INT32_MIN * ((S)1 << 8 * (sizeof(S) - 4));
    int32_t multiplier, shift;
    uint32_t total = 0;
    for (int32_t i = 0; i < keys; i++) {
        S sum = 0;
        for (int32_t j = 0; j < a->depth; j++) {
            sum += (S)(q[j * a->q_column] - a->q_zero) * (k[i * a->k_row + j * a->k_column] - a->k_zero);
        }
        part[i] = sum;
        if (sum > largest && (!a->keep || a->keep[query * a->keys + i])) {
            largest = sum;
        }
    }
    for (int32_t i = 0; i < a->keys; i++) {
        const int64_t far = i < keys ? (int64_t)largest - part[i] : INT64_MAX;
        part[i] = 0;
        if (far >= 0 && far <= a->reach && (!a->keep || a->keep[query * a->keys + i])) {
            part[i] = exp_steps(a->table, (int32_t)rescale_R((S)far, a->multiplier[0], a->shift[0]));
        }
        total += ((uint32_t)part[i] + 2048u) >> 12;
    }
    multiplier = reciprocal(total, &shift);
    shift += a->bits - 31;
    if (shift < -31) {
        multiplier = 0;
        shift = -31;
    }
    for (int32_t i = 0; i < a->keys; i++) {
        part[i] = requantize_R(part[i], multiplier, shift, &whole);
    }
}

static void attention_X_Z_V_Y_R(const struct attention *a, const X *q, const Z *k, const V *v, Y *y, void *scratch)
{
    S *part = scratch;
    for (int32_t head = 0; head < a->n[0] * a->n[1]; head++) {
        const int32_t i = head / a->n[1], j = head % a->n[1];
        const V *from = v + i * a->v_head[0] + j * a->v_head[1];
        for (int32_t query = 0; query < a->queries; query++) {
            const X *row = q + i * a->q_head[0] + j * a->q_head[1] + query * a->q_row;
            Y *to = y + i * a->y_head[0] + j * a->y_head[1] + query * a->y_row;
            shares_X_Z_R(a, row, k + i * a->k_head[0] + j * a->k_head[1], query, part);
            for (int32_t o = 0; o < a->outputs; o++) {
                S sum = 0;
                for (int32_t key = 0; key < a->keys; key++) {
                    sum += part[key] * (from[key * a->v_row + o * a->v_column] - a->v_zero);
                }
                to[o * a->y_column] = (Y)requantize_R(sum, a->multiplier[1], a->shift[1], &a->to);
            }
        }
    }
}
