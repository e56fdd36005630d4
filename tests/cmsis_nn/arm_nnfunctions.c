/* Naive loops behind the stand-in header. They ask for the scratch that CMSIS-NN publishes and fill all of it with rubbish first. */
#include "arm_nnfunctions.h"

static int32_t rescale(int32_t sum, int32_t multiplier, int32_t shift)
{
#if defined(CMSIS_NN_USE_SINGLE_ROUNDING)
    return (int32_t)((((int64_t)sum * multiplier >> (30 - shift)) + 1) >> 1);
#else
    const int32_t left = shift > 0 ? shift : 0, right = shift > 0 ? 0 : -shift;
    const int32_t high = (int32_t)(((int64_t)sum * ((int64_t)1 << left) * multiplier + (1 << 30)) >> 31);
    const int64_t half = right ? (int64_t)1 << (right - 1) : 0;
    return (int32_t)(high < 0 ? -((-(int64_t)high + half) >> right) : (high + half) >> right);
#endif
}

static int8_t code(int32_t sum, int32_t multiplier, int32_t shift, int32_t offset, const cmsis_nn_activation *a)
{
    const int64_t y = (int64_t)rescale(sum, multiplier, shift) + offset;
    return (int8_t)(y < a->min ? a->min : y > a->max ? a->max : y);
}

static arm_cmsis_nn_status rubbish(const cmsis_nn_context *ctx, int32_t needed)
{
    for (int32_t i = 0; i < ctx->size; i++) {
        ((int8_t *)ctx->buf)[i] = 0x5A;
    }
    return ctx->size < needed ? ARM_CMSIS_NN_ARG_ERROR : ARM_CMSIS_NN_SUCCESS;
}

int32_t arm_convolve_wrapper_s8_get_buffer_size(const cmsis_nn_conv_params *p, const cmsis_nn_dims *in, const cmsis_nn_dims *f, const cmsis_nn_dims *out)
{
    const int32_t depth = f->w * f->h * in->c;
    (void)p, (void)out;
    return f->w * f->h == 1 && !p->padding.w && !p->padding.h ? 0 : 4 * ((depth + 15) / 16 * 16);
}

arm_cmsis_nn_status arm_convolve_wrapper_s8(
    const cmsis_nn_context *ctx, const cmsis_nn_conv_params *p, const cmsis_nn_per_channel_quant_params *q, const cmsis_nn_dims *in, const int8_t *x,
    const cmsis_nn_dims *f, const int8_t *w, const cmsis_nn_dims *bd, const int32_t *bias, const cmsis_nn_dims *out, int8_t *y)
{
    const int32_t groups = in->c / f->c, per = out->c / groups;
    if (rubbish(ctx, arm_convolve_wrapper_s8_get_buffer_size(p, in, f, out)) || f->n != out->c || bd->c != out->c || in->n != 1 || out->n != 1) {
        return ARM_CMSIS_NN_ARG_ERROR;
    }
    for (int32_t i = 0; i < out->h; i++) for (int32_t j = 0; j < out->w; j++) for (int32_t o = 0; o < out->c; o++) {
        int32_t sum = bias[o];
        for (int32_t k = 0; k < f->h; k++) for (int32_t l = 0; l < f->w; l++) for (int32_t c = 0; c < f->c; c++) {
            const int32_t r = i * p->stride.h - p->padding.h + k * p->dilation.h, s = j * p->stride.w - p->padding.w + l * p->dilation.w;
            if (r >= 0 && r < in->h && s >= 0 && s < in->w) {
                sum += (x[(r * in->w + s) * in->c + o / per * f->c + c] + p->input_offset) * w[((o * f->h + k) * f->w + l) * f->c + c];
            }
        }
        y[(i * out->w + j) * out->c + o] = code(sum, q->multiplier[o], q->shift[o], p->output_offset, &p->activation);
    }
    return ARM_CMSIS_NN_SUCCESS;
}

int32_t arm_depthwise_conv_wrapper_s8_get_buffer_size(const cmsis_nn_dw_conv_params *p, const cmsis_nn_dims *in, const cmsis_nn_dims *f, const cmsis_nn_dims *out)
{
    (void)p, (void)out;
    return 2 * in->c * f->w * f->h;
}

arm_cmsis_nn_status arm_depthwise_conv_wrapper_s8(
    const cmsis_nn_context *ctx, const cmsis_nn_dw_conv_params *p, const cmsis_nn_per_channel_quant_params *q, const cmsis_nn_dims *in,
    const int8_t *x, const cmsis_nn_dims *f, const int8_t *w, const cmsis_nn_dims *bd, const int32_t *bias, const cmsis_nn_dims *out, int8_t *y)
{
    if (rubbish(ctx, arm_depthwise_conv_wrapper_s8_get_buffer_size(p, in, f, out)) || f->n != 1 || bd->c != out->c
        || f->c != out->c || in->c * p->ch_mult != out->c) {
        return ARM_CMSIS_NN_ARG_ERROR;
    }
    for (int32_t i = 0; i < out->h; i++) for (int32_t j = 0; j < out->w; j++) for (int32_t o = 0; o < out->c; o++) {
        int32_t sum = bias[o];
        for (int32_t k = 0; k < f->h; k++) for (int32_t l = 0; l < f->w; l++) {
            const int32_t r = i * p->stride.h - p->padding.h + k * p->dilation.h, s = j * p->stride.w - p->padding.w + l * p->dilation.w;
            if (r >= 0 && r < in->h && s >= 0 && s < in->w) {
                sum += (x[(r * in->w + s) * in->c + o / p->ch_mult] + p->input_offset) * w[(k * f->w + l) * f->c + o];
            }
        }
        y[(i * out->w + j) * out->c + o] = code(sum, q->multiplier[o], q->shift[o], p->output_offset, &p->activation);
    }
    return ARM_CMSIS_NN_SUCCESS;
}
