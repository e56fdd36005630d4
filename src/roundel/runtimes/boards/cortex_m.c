/* Start of a Cortex-M under QEMU: vectors, memory, semihosting; the debugger's host opens, reads and writes the files. */
#include "semihosting.h"

extern uint32_t stack_top, data_start, data_end, data_load, bss_start, bss_end;
int main(void);

int32_t semihosting(int32_t operation, const void *block)
{
    register int32_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = block;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

static void start(void)
{
    uint32_t *to = &data_start;
    for (const uint32_t *from = &data_load; to < &data_end;) {
        *to++ = *from++;
    }
    for (to = &bss_start; to < &bss_end;) {
        *to++ = 0;
    }
    leave(main());
}

static void reset(void)
{
#if defined(__ARM_FP) || defined(__ARM_FEATURE_MVE)
    *(volatile uint32_t *)0xE000ED88u |= 0xFu << 20; /* the coprocessor that vectors need, before anything uses them */
    __asm__ volatile("dsb\n\tisb");
#endif
    start();
}

static void fault(void)
{
    leave(99);
}

typedef void (*vector)(void);
__attribute__((section(".vectors"), used)) static const vector vectors[16] = {
    (vector)&stack_top, reset, fault, fault, fault, fault, fault, 0, 0, 0, 0, fault, fault, 0, fault, fault,
};
