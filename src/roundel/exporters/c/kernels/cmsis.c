#include "arm_nnfunctions.h"

/* Called where CMSIS-NN refuses a call or rounds otherwise, since its codes would be wrong: a fault of the build. */
#if !defined(ROUNDEL_REFUSED)
#if defined(__GNUC__)
#define ROUNDEL_REFUSED() __builtin_trap()
#else
#define ROUNDEL_REFUSED() do {} while (1)
#endif
#endif

/* A convolution as CMSIS-NN takes it: the zero point of x apart, weights [output][kernel_h][kernel_w][channel] or, of channels that
 * stand alone, [kernel_h][kernel_w][output]. room is the scratch in bytes. */
struct cmsis {
    const int8_t *weight;
    const int32_t *bias, *multiplier, *shift;
    int32_t height, width, channels, out_height, out_width, outputs, kernel_h, kernel_w, depth;
    int32_t stride_h, stride_w, dilation_h, dilation_w, top, left, x_zero, y_zero, low, high, room;
};
