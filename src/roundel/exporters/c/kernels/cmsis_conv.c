#include "cmsis.c"
#include "cmsis_R.c"

static void cmsis_conv(const struct cmsis *a, const int8_t *x, int8_t *y, void *scratch)
{
    const cmsis_nn_context buffer = {.buf = scratch, .size = a->room};
    const cmsis_nn_conv_params how = {
        .input_offset = -a->x_zero, .output_offset = a->y_zero, .stride = {.w = a->stride_w, .h = a->stride_h},
        .padding = {.w = a->left, .h = a->top}, .dilation = {.w = a->dilation_w, .h = a->dilation_h},
        .activation = {.min = a->low, .max = a->high}};
    const cmsis_nn_per_channel_quant_params factors = {.multiplier = (int32_t *)a->multiplier, .shift = (int32_t *)a->shift};
    const cmsis_nn_dims in = {.n = 1, .h = a->height, .w = a->width, .c = a->channels}, out = {.n = 1, .h = a->out_height,
        .w = a->out_width, .c = a->outputs}, rows = {.n = a->outputs, .h = a->kernel_h, .w = a->kernel_w, .c = a->depth},
        each = {.n = 1, .h = 1, .w = 1, .c = a->outputs};
    if (arm_convolve_wrapper_s8_get_buffer_size(&how, &in, &rows, &out) > a->room
        || arm_convolve_wrapper_s8(&buffer, &how, &factors, &in, x, &rows, a->weight, &each, a->bias, &out, y)
            != ARM_CMSIS_NN_SUCCESS) {
        ROUNDEL_REFUSED();
    }
}
