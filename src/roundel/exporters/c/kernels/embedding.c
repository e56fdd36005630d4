#include "requantize.c"
#include "weight_W.c"

/* Rows of weights by count ids, rescaled by one factor or (each 1) by the row's own; an id that is none reads row 0. */
struct embedding {
    const int8_t *weight;
    const int32_t *multiplier;
    const int8_t *shift;
    const int16_t *levels;
    int32_t count, vocabulary, depth, stride, level_step, each;
    struct codes to;
};

static void embedding_X_Y_R_W(const struct embedding *a, const X *ids, Y *y)
{
    for (int32_t i = 0; i < a->count; i++) {
        const int32_t id = ids[i] >= 0 && ids[i] < a->vocabulary ? (int32_t)ids[i] : 0;
        const int8_t *row = a->weight + id * a->stride;
        for (int32_t j = 0; j < a->depth; j++) {
            const int32_t weight = weight_W(row, a->levels + id * a->level_step, j);
            *y++ = (Y)requantize_R(weight, a->multiplier[id * a->each], a->shift[id * a->each], &a->to);
        }
    }
}
